"""What a calibration keeps on disk, so that it can be killed at any moment and go on.

A finished layer is one folder that appears by a rename. The hidden states after it are complete before that,
and those before it are removed after that, so a resumed run finds what the next layer reads.
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from gearshift._checks import check_keys
from gearshift.errors import OutputExistsError
from gearshift.files import PARTIAL, atomic_directory, atomic_file, read_json, write_json
from gearshift.train.calibrate.settings import CalibrationError, CalibrationSettings

FORMAT = "gearshift-calibration-1"

Row = dict[str, Any]


@dataclass(frozen=True)
class Record:
    """What a calibration was made from; a resumed one must be made from the same.

    Attributes:
        settings: the settings.
        supernet: digest of the supernet.
        data: digest of the tokens of all windows.
        provenance: commit, date, command, versions and hardware of the first run.
        format: the version of the directory.
    """

    settings: CalibrationSettings
    supernet: str
    data: str
    provenance: dict[str, str]
    format: str = FORMAT


@dataclass(frozen=True)
class CalibrationDirectory:
    """Where a calibration keeps what."""

    root: Path

    @property
    def record(self) -> Path:
        """What it is made from."""
        return self.root / "settings.json"

    @property
    def rows(self) -> Path:
        """One JSON line a layer and mixer."""
        return self.root / "calibration.jsonl"

    @property
    def work(self) -> Path:
        """What only a run that has not ended needs."""
        return self.root / "work"

    @property
    def supernet(self) -> Path:
        """The result; it is there only when the run has ended."""
        return self.root / "supernet"

    def hidden(self, layer: int) -> Path:
        """The inputs of a layer."""
        return self.work / f"hidden-{layer:05}.bin"

    @property
    def targets(self) -> Path:
        """The attention outputs of the layer that is worked on."""
        return self.work / "targets.bin"

    def layer(self, layer: int) -> Path:
        """The folder of a finished layer."""
        return self.work / f"layer-{layer:05}"

    def finished_layers(self) -> int:
        """How many layers, from the first, are finished."""
        count = 0
        while self.layer(count).is_dir():
            count += 1
        return count

    def refuse_existing(self, resume: bool) -> None:
        """Raise if something is there that shall not be gone on with.

        Raises:
            OutputExistsError: there is, and ``resume`` is false.
            CalibrationError: there is something else than a calibration.
        """
        if not os.path.lexists(self.root) or (self.root.is_dir() and self._is_empty()):
            return
        if not resume:
            raise OutputExistsError(
                f"the output {self.root} already exists; go on with --resume, or give a new path"
            )
        if not self.record.is_file():
            raise CalibrationError(
                f"{self.root} holds no {self.record.name}, so it is no calibration; give a new path"
            )

    def _is_empty(self) -> bool:
        """Whether there is nothing but what a run left that was killed while it wrote its record."""
        left = re.compile(re.escape(f".{self.record.name}.") + "[0-9a-f]{8}" + re.escape(PARTIAL))
        return all(left.fullmatch(path.name) for path in self.root.iterdir())

    def start(self, record: Record) -> None:
        """Note what the calibration is made from, or check that it is what an earlier run noted.

        Raises:
            CalibrationError: something differs.
        """
        if not self.record.exists():
            write_json(self.record, asdict(record))
            return
        earlier = read_record(self.record)
        changes = earlier.settings.differences(record.settings)
        for what in ("supernet", "data"):
            was, now = getattr(earlier, what), getattr(record, what)
            changes += [f"{what}: was of digest {was}, now {now}"] if was != now else []
        if changes:
            raise CalibrationError(
                f"{self.root} was made otherwise ({'; '.join(changes)}); resume with what it was started "
                "with, or give a new path"
            )

    def finish_layer(self, layer: int, tensors: Mapping[str, Tensor], rows: Sequence[Row]) -> None:
        """Keep what came of a layer; what only this layer needed goes."""
        with atomic_directory(self.layer(layer), overwrite=True) as partial:
            save_file(dict(tensors), partial / "mixers.safetensors")
            write_json(partial / "rows.json", list(rows))
        self.hidden(layer).unlink(missing_ok=True)
        self.targets.unlink(missing_ok=True)

    def read_rows(self, layer: int) -> list[Row]:
        """The rows of a finished layer."""
        return read_json(self.layer(layer) / "rows.json")

    def read_tensors(self, layer: int) -> dict[str, Tensor]:
        """The calibrated tensors of a finished layer.

        Raises:
            CalibrationError: the file is missing or damaged.
        """
        path = self.layer(layer) / "mixers.safetensors"
        try:
            return load_file(path)
        except (OSError, SafetensorError) as error:
            raise CalibrationError(
                f"{path} cannot be read ({error}); remove {self.work} and go on with --resume, which does "
                "all layers again"
            ) from None

    def write_rows(self, rows: Sequence[str]) -> None:
        """Write the lines of ``calibration.jsonl``."""
        with atomic_file(self.rows) as partial:
            partial.write_text("".join(row + "\n" for row in rows), encoding="utf-8")

    def clear(self) -> None:
        """Remove what only a run that has not ended needs."""
        shutil.rmtree(self.work, ignore_errors=True)


def read_record(path: Path) -> Record:
    """Read what a calibration was made from.

    Raises:
        CalibrationError: it is damaged or of another version.
        FileFormatError: it is no JSON.
    """
    given = check_keys(Record, read_json(path), str(path), CalibrationError)
    if given.get("format") != FORMAT:
        raise CalibrationError(f"{path}: the format is {given.get('format')!r}; expected {FORMAT!r}")
    fields = check_keys(CalibrationSettings, given["settings"], f"{path}, settings", CalibrationError)
    if not isinstance(fields.get("parts"), list):
        raise CalibrationError(f"{path}, settings: parts is {fields.get('parts')!r}; expected a list")
    fields["parts"] = tuple(fields["parts"])
    given["settings"] = CalibrationSettings(**fields)
    return Record(**given)

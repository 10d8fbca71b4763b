"""presets.json: named placements with what was measured of them. Plain data, no torch."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gearshift._checks import check_keys, is_number
from gearshift.errors import GearshiftError
from gearshift.files import read_json, write_json
from gearshift.placement import Placement, PlacementError, PlacementSpace
from gearshift.workload import Workload, WorkloadError

PRESETS_FILE = "presets.json"
FORMAT = "gearshift-presets-1"

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")


class PresetError(GearshiftError, ValueError):
    """A preset, or the file of presets, is not what it should be."""


def _check_number(what: str, value: object) -> None:
    if not is_number(value) or value < 0:  # pyright: ignore[reportOperatorIssue] - is_number checked it
        raise PresetError(f"{what} = {value!r}; expected a finite number, at least 0")


@dataclass(frozen=True)
class Measurement:
    """Speed of a preset as measured for one workload.

    Attributes:
        workload: what was served.
        seconds_per_token: seconds per generated token of one decode step, over the sequences of the step.
        speed_up: seconds_per_token of all-FA divided by this one.
        hardware: the machine it was measured on.

    Raises:
        PresetError: a number is negative or not finite.
    """

    workload: Workload
    seconds_per_token: float
    speed_up: float
    hardware: str

    def __post_init__(self) -> None:
        _check_number("seconds_per_token", self.seconds_per_token)
        _check_number("speed_up", self.speed_up)
        if not isinstance(self.hardware, str):
            raise PresetError(f"hardware = {self.hardware!r}; expected a text")

    @classmethod
    def from_json(cls, given: object) -> Measurement:
        """Read the JSON form.

        Raises:
            PresetError: a key is missing or unknown, or a value is wrong.
        """
        values = check_keys(cls, given, "a measurement", PresetError)
        try:
            return cls(**{**values, "workload": Workload.from_json(values["workload"])})
        except WorkloadError as error:
            raise PresetError(str(error)) from None

    def to_json(self) -> dict[str, Any]:
        """The JSON form."""
        return {**vars(self), "workload": self.workload.to_json()}


@dataclass(frozen=True)
class Preset:
    """A named placement.

    Attributes:
        name: letters, digits, ``.``, ``_`` and ``-``.
        placement: one mixer per layer.
        quality: measured quality, None if not measured.
        retention: measured quality over the teacher's, None if not measured.
        predicted_quality: the surrogate's quality, None if there was no surrogate.
        measurements: measured speeds, one per workload.

    Raises:
        PresetError: the name is malformed, or a number is negative or not finite.
    """

    name: str
    placement: Placement
    quality: float | None = None
    retention: float | None = None
    predicted_quality: float | None = None
    measurements: tuple[Measurement, ...] = ()

    def __post_init__(self) -> None:
        if not isinstance(self.name, str) or not _NAME.fullmatch(self.name):
            raise PresetError(f"the preset name {self.name!r}; expected letters, digits, '.', '_' and '-'")
        for field in ("quality", "retention", "predicted_quality"):
            if getattr(self, field) is not None:
                _check_number(field, getattr(self, field))

    @classmethod
    def from_json(cls, given: object) -> Preset:
        """Read the JSON form; the placement may be a list of names or the text form.

        Raises:
            PresetError: a key is missing or unknown, or a value is wrong.
        """
        values = dict(check_keys(cls, given, "a preset", PresetError))
        placement, measurements = values["placement"], values.get("measurements", [])
        if not isinstance(measurements, list):
            raise PresetError(f"measurements = {measurements!r}; expected a list")
        try:
            parse = Placement.parse if isinstance(placement, str) else Placement.from_json
            values["placement"] = parse(placement)
        except PlacementError as error:
            raise PresetError(str(error)) from None
        values["measurements"] = tuple(Measurement.from_json(row) for row in measurements)
        return cls(**values)

    def to_json(self) -> dict[str, Any]:
        """The JSON form."""
        measurements = [measurement.to_json() for measurement in self.measurements]
        return {**vars(self), "placement": self.placement.to_json(), "measurements": measurements}


def read_presets(directory: Path, space: PlacementSpace | None = None) -> dict[str, Preset]:
    """Read ``presets.json`` of a supernet directory: presets by name, in the file's order.

    Args:
        directory: the folder that holds the file; without the file there are no presets.
        space: the model's placements; when given, every preset must lie in it.

    Raises:
        PresetError: the file is malformed; the message names the file and the preset.
        FileFormatError: the file is not JSON.
    """
    path = Path(directory) / PRESETS_FILE
    if not path.exists():
        return {}
    content = read_json(path)
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        given = content.get("format") if isinstance(content, dict) else type(content).__name__
        raise PresetError(f'{path}: the format is {given!r}; expected an object with "format": {FORMAT!r}')
    rows = content.get("presets")
    if not isinstance(rows, list):
        raise PresetError(f'{path}: "presets" is {rows!r}; expected a list of presets')
    return _by_name(
        (_read_preset(path, number, row) for number, row in enumerate(rows, start=1)), space, path
    )


def _read_preset(path: Path, number: int, row: object) -> Preset:
    try:
        return Preset.from_json(row)
    except PresetError as error:
        name = row.get("name") if isinstance(row, dict) else None
        raise PresetError(f"{path}, preset {number} ({name!r}): {error}") from None


def _by_name(presets: Iterable[Preset], space: PlacementSpace | None, path: Path) -> dict[str, Preset]:
    """Collect presets by name, refusing a name given twice and a placement of another model."""
    found: dict[str, Preset] = {}
    for preset in presets:
        if preset.name in found:
            raise PresetError(f"{path}: the preset {preset.name!r} is there twice; expected each name once")
        first = next(iter(found.values()), preset)
        if len(preset.placement) != len(first.placement):
            raise PresetError(
                f"{path}: the preset {preset.name!r} has {len(preset.placement)} layers; "
                f"expected {len(first.placement)}, as the preset {first.name!r} has"
            )
        found[preset.name] = preset
        try:
            if space is not None:
                space.check(preset.placement)
        except PlacementError as error:
            raise PresetError(f"{path}, preset {preset.name!r}: {error}") from None
    return found


def write_presets(directory: Path, presets: Iterable[Preset] | Mapping[str, Preset]) -> Path:
    """Write ``presets.json`` into a supernet directory, replacing the old one in one step.

    Raises:
        PresetError: two presets share a name, or their placements differ in length.
    """
    path = Path(directory) / PRESETS_FILE
    rows = presets.values() if isinstance(presets, Mapping) else presets
    checked = _by_name(rows, None, path)
    write_json(path, presets_json(checked.values()))
    return path


def presets_json(presets: Iterable[Preset]) -> dict[str, Any]:
    """The content of ``presets.json``."""
    return {"format": FORMAT, "presets": [preset.to_json() for preset in presets]}


def named_preset(presets: Mapping[str, Preset], name: str) -> Preset:
    """One of a supernet's presets.

    Raises:
        PresetError: there is none of this name; the message lists those that there are.
    """
    if name not in presets:
        known = ", ".join(presets) or "none yet (gearshift search --supernet writes them)"
        raise PresetError(f"there is no preset {name!r}; this supernet's presets: {known}")
    return presets[name]

"""The log of a run, ``metrics.jsonl``, and trackers that get the same numbers. No torch."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol, Self

from gearshift.errors import GearshiftError
from gearshift.files import atomic_file, read_json_lines


class TrackerError(GearshiftError):
    """A tracker that a recipe names is not installed, or does not start."""


class Tracker(Protocol):
    """Where numbers go besides the log."""

    def log(self, numbers: Mapping[str, float], step: int) -> None:
        """Take the numbers of one step."""
        ...

    def close(self) -> None:
        """No more will come."""
        ...


class MetricsLog:
    """Appends a row a step to a file that stays open; a kill can tear the last line only.

    Opening it drops what lies beyond ``last_step``: the rows that a resumed run is about to write again, and
    a torn last line.

    Args:
        path: the file.
        last_step: the last step that is done.
        trackers: what gets the numbers, too.
    """

    def __init__(self, path: Path, last_step: int, trackers: Sequence[Tracker] = ()) -> None:
        rows = [row for row in read_json_lines(path) if row["step"] <= last_step] if path.exists() else []
        with atomic_file(path) as partial:
            partial.write_text("".join(_line(row) for row in rows), encoding="utf-8")
        self._file = path.open("a", encoding="utf-8")
        self._trackers = trackers

    def append(self, row: dict[str, Any]) -> None:
        """Write one row; it survives a kill of this process as soon as this returns."""
        self._file.write(_line(row))
        self._file.flush()
        for tracker in self._trackers:
            tracker.log(dict(numbers(row)), row["step"])

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()
        for tracker in self._trackers:
            tracker.close()


def _line(row: dict[str, Any]) -> str:
    return json.dumps(row, allow_nan=False) + "\n"


def numbers(row: Mapping[str, Any], above: str = "") -> Iterator[tuple[str, float]]:
    """Every number of a row under the keys that lead to it, as in ``mixers/gdn/activation``."""
    for key, value in row.items():
        name = f"{above}/{key}" if above else key
        if isinstance(value, Mapping):
            yield from numbers(value, name)
        elif isinstance(value, list):
            yield from numbers({str(index): item for index, item in enumerate(value)}, name)
        elif isinstance(value, int | float) and not isinstance(value, bool):
            yield name, float(value)

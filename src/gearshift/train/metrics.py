"""The log of a run, ``metrics.jsonl``: one row a step. No torch."""

from __future__ import annotations

import json
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from gearshift.files import atomic_file, read_json_lines


class MetricsLog:
    """Appends a row a step to a file that stays open; a kill can tear the last line only.

    Opening it drops what lies beyond ``last_step``: the rows that a resumed run is about to write again, and
    a torn last line.
    """

    def __init__(self, path: Path, last_step: int) -> None:
        rows = [row for row in read_json_lines(path) if row["step"] <= last_step] if path.exists() else []
        with atomic_file(path) as partial:
            partial.write_text("".join(_line(row) for row in rows), encoding="utf-8")
        self._file = path.open("a", encoding="utf-8")

    def append(self, row: dict[str, Any]) -> None:
        """Write one row; it survives a kill of this process as soon as this returns."""
        self._file.write(_line(row))
        self._file.flush()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()


def _line(row: dict[str, Any]) -> str:
    return json.dumps(row, allow_nan=False) + "\n"

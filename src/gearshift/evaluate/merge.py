"""Tables that shards wrote, merged into one. No torch."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from gearshift.evaluate.table import EvaluationTableError, Row, check_agreement, is_torn, key_of, read_table
from gearshift.files import atomic_file
from gearshift.placement import Placement


@dataclass(frozen=True)
class Merged:
    """What a merge did.

    Attributes:
        rows: in the merged table.
        duplicates: rows that were there already, and agreed.
        torn: files that ended within a row, which was left out.
        origins: rows by (checkpoint, data).
    """

    rows: int
    duplicates: int
    torn: tuple[Path, ...]
    origins: dict[tuple[str, str], int]

    def notes(self) -> list[str]:
        """A sentence for each thing worth knowing."""
        told = [f"{path} ends within a row, which was left out: run that shard again" for path in self.torn]
        if self.duplicates:
            told.append(f"{self.duplicates} rows were there twice and agree; the first of each was kept")
        if len(self.origins) > 1:
            counts = ", ".join(
                f"{rows} of {checkpoint} on {data}" for (checkpoint, data), rows in self.origins.items()
            )
            told.append(
                f"rows of {len(self.origins)} checkpoints or sets of data, not to be compared: {counts}"
            )
        return told


def merge_tables(paths: Sequence[Path], out: Path) -> Merged:
    """Write the rows of several tables into one, each placement of a checkpoint on some data once.

    The merged table is written in one step; an interruption leaves what was there. ``out`` may be one of the
    tables.

    Raises:
        EvaluationTableError: a table is missing, a row is none, or two rows contradict each other; nothing is
            written.
    """
    found: dict[tuple[str, str, Placement], Row] = {}
    given = 0
    for path in paths:
        if not path.is_file():
            raise EvaluationTableError(f"{path} is missing; expected a table that gearshift evaluate wrote")
        for number, row in enumerate(read_table(path), start=1):
            given += 1
            check_agreement(found.setdefault(key_of(row), row), row, f"{path}, row {number}")
    torn = tuple(path for path in paths if is_torn(path))
    with atomic_file(out) as partial:
        partial.write_text("".join(json.dumps(row) + "\n" for row in found.values()), encoding="utf-8")
    origins: dict[tuple[str, str], int] = {}
    for checkpoint, data, _ in found:
        origins[checkpoint, data] = origins.get((checkpoint, data), 0) + 1
    return Merged(len(found), given - len(found), torn, origins)

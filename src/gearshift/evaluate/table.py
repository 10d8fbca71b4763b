"""The table of evaluated placements: JSON lines, one row a placement, appended one at a time. No torch."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from gearshift.errors import GearshiftError
from gearshift.files import append_json_line, read_json_lines
from gearshift.placement import Placement, PlacementError

Row = dict[str, Any]

# checkpoint and data name what was evaluated on what; loss, kl, quality and retention are explained in
# quality.py.
COLUMNS = (
    "checkpoint",
    "data",
    "placement",
    "loss",
    "kl",
    "recall",
    "quality",
    "retention",
    "tokens",
    "seconds",
    "provenance",
)


class EvaluationTableError(GearshiftError):
    """A table of evaluations holds a row that is none."""


def read_table(path: Path) -> list[Row]:
    """The rows of a table; none if there is no file. A last line torn by a crash is left out.

    Raises:
        FileFormatError: a line is not a JSON object.
        EvaluationTableError: a row lacks a column, or its placement cannot be read.
    """
    rows = read_json_lines(path) if path.exists() else []
    for number, row in enumerate(rows, start=1):
        if missing := [column for column in COLUMNS if column not in row]:
            raise EvaluationTableError(
                f"{path}, row {number}: no {missing[0]!r}; expected the columns {', '.join(COLUMNS)}: "
                "remove the row, or give another file"
            )
        try:
            Placement.parse(row["placement"])
        except (PlacementError, AttributeError) as error:
            raise EvaluationTableError(f"{path}, row {number}: {error}") from None
    return rows


def append_row(path: Path, row: Row) -> None:
    """Add one row, on the disk when this returns; what a crash tore before it is dropped."""
    assert set(row) == set(COLUMNS), "a row has exactly the table's columns"
    append_json_line(path, row)


def select_rows(rows: Iterable[Row], checkpoint: str, data: str) -> dict[Placement, Row]:
    """The rows of one checkpoint on one set of data, by placement; of several the last one."""
    return {
        Placement.parse(row["placement"]): row
        for row in rows
        if row["checkpoint"] == checkpoint and row["data"] == data
    }

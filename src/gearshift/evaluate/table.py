"""The table of evaluated placements: JSON lines, one row a placement, appended one at a time. No torch."""

from __future__ import annotations

import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from gearshift._checks import is_number
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


# Columns that are a number in every row; kl is null where the teacher's distribution is out of reach.
_NUMBERS = ("loss", "quality", "retention")
# By how much, relative and absolute, two losses of one placement may differ: machines add up differently.
TOLERANCE = 2e-3


class EvaluationTableError(GearshiftError):
    """A table of evaluations holds a row that is none, or rows that contradict each other."""


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
        for column in _NUMBERS:
            if not is_number(row[column]):
                raise EvaluationTableError(
                    f"{path}, row {number} ({row['placement']}): {column} = {row[column]!r}; expected a "
                    "finite number: remove the row and evaluate the placement again"
                )
    return rows


def is_torn(path: Path) -> bool:
    """Whether a file ends within a row, as what was interrupted leaves it."""
    with path.open("rb") as file:
        return file.seek(0, 2) > 0 and (file.seek(-1, 2), file.read(1))[1] != b"\n"


def append_row(path: Path, row: Row) -> None:
    """Add one row, on the disk when this returns; what a crash tore before it is dropped."""
    assert set(row) == set(COLUMNS), "a row has exactly the table's columns"
    append_json_line(path, row)


def key_of(row: Row) -> tuple[str, str, Placement]:
    """Rows with the same key are evaluations of the same thing: checkpoint, data and placement."""
    return row["checkpoint"], row["data"], Placement.parse(row["placement"])


def check_agreement(first: Row, other: Row, where: str) -> None:
    """Refuse two rows of one key that say different things.

    Raises:
        EvaluationTableError: their losses differ by more than machines do; the message says where.
    """
    if not math.isclose(first["loss"], other["loss"], rel_tol=TOLERANCE, abs_tol=TOLERANCE):
        raise EvaluationTableError(
            f"{where}: the placement {other['placement']} has the loss {other['loss']:.6g}, an earlier row "
            f"of the same checkpoint and data {first['loss']:.6g}; find out which is right, remove the other"
        )


def select_rows(rows: Iterable[Row], checkpoint: str, data: str) -> dict[Placement, Row]:
    """The rows of one checkpoint on one set of data, by placement; of several the first one.

    Raises:
        EvaluationTableError: two of them contradict each other.
    """
    found: dict[Placement, Row] = {}
    for number, row in enumerate(rows, start=1):
        if row["checkpoint"] == checkpoint and row["data"] == data:
            first = found.setdefault(Placement.parse(row["placement"]), row)
            check_agreement(first, row, f"row {number}")
    return found

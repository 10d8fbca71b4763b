"""Evaluated placements and their values, checked and ready for a fit."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from gearshift._checks import is_number
from gearshift.errors import GearshiftError
from gearshift.placement import FULL_ATTENTION, Placement, PlacementError, PlacementSpace
from gearshift.search.space import Array
from gearshift.search.target import Target, TargetError


class TableError(GearshiftError, ValueError):
    """Evaluation rows that cannot be used together."""


@dataclass(frozen=True, eq=False)
class EvaluationTable:
    """Distinct placements of one checkpoint with their values on one set of data.

    Attributes:
        space: the checkpoint's placements.
        target: what the values are.
        placements: distinct.
        values: (n,) of the target.
        checkpoint: digest of the supernet they were evaluated with.
        data: name of what they were evaluated on.
        teacher_quality: ``quality`` of all-FA, if it is among the rows.
    """

    space: PlacementSpace
    target: Target
    placements: tuple[Placement, ...]
    values: Array
    checkpoint: str
    data: str
    teacher_quality: float | None

    @property
    def teacher_value(self) -> float | None:
        """Value of all-FA, if it is among the placements."""
        by_placement = dict(zip(self.placements, self.values.tolist(), strict=True))
        return by_placement.get(Placement.uniform(FULL_ATTENTION, self.space.num_layers))

    def __len__(self) -> int:
        return len(self.placements)


def build_table(
    rows: Iterable[Mapping[str, Any]],
    space: PlacementSpace,
    target: str | Target,
    tolerance: float = 1e-4,
) -> EvaluationTable:
    """Check evaluation rows and collect their values.

    Args:
        rows: as `gearshift evaluate` writes them: ``placement``, ``checkpoint``, ``data`` and the target's
            column.
        space: where the placements must lie.
        target: what to predict, such as ``"-kl"``; see `Target`.
        tolerance: by how much, relative and absolute, two values of one placement may differ; the first one
            is used.

    Raises:
        TableError: there is no row, a row lacks a key or holds no finite number, a placement lies outside the
            space, rows are of different checkpoints or data, or contradict each other. The message names the
            row.
        TargetError: the target is malformed.
    """
    target = target if isinstance(target, Target) else Target.parse(target)
    values: dict[Placement, float] = {}
    origin: tuple[str, str] | None = None
    teacher_quality: float | None = None
    for number, row in enumerate(rows, start=1):
        placement, value = _read_row(number, row, space, target)
        origin = _check_origin(number, row, origin)
        _check_repeat(number, placement, value, values.setdefault(placement, value), tolerance)
        if set(placement) == {FULL_ATTENTION} and is_number(row.get("quality")):
            teacher_quality = float(row["quality"])
    if origin is None:
        raise TableError("there are no evaluation rows; evaluate some placements first")
    return EvaluationTable(
        space, target, tuple(values), np.array(list(values.values())), *origin, teacher_quality
    )


def _read_row(
    number: int, row: Mapping[str, Any], space: PlacementSpace, target: Target
) -> tuple[Placement, float]:
    """Placement and value of a row; the number counts from 1 and is for messages."""
    missing = [key for key in ("placement", "checkpoint", "data") if key not in row]
    if missing:
        raise TableError(f"evaluation row {number} has no {missing[0]!r}; it has {sorted(row)}")
    try:
        placement = space.check(Placement.of(row["placement"]))
        return placement, target.of_row(row)
    except (PlacementError, TargetError) as error:
        raise TableError(f"evaluation row {number} ({row['placement']}): {error}") from None


def _check_origin(number: int, row: Mapping[str, Any], origin: tuple[str, str] | None) -> tuple[str, str]:
    mine = (str(row["checkpoint"]), str(row["data"]))
    for key, given, expected in zip(("checkpoint", "data"), mine, origin or mine, strict=True):
        if given != expected:
            raise TableError(
                f"evaluation row {number} ({row['placement']}) has the {key} {given!r}, the rows before it "
                f"{expected!r}; values of different origin cannot be compared, so keep one of them"
            )
    return mine


def _check_repeat(number: int, placement: Placement, value: float, first: float, tolerance: float) -> None:
    if not math.isclose(value, first, rel_tol=tolerance, abs_tol=tolerance):
        raise TableError(
            f"evaluation row {number} ({placement}) has the value {value:g}, an earlier row of this "
            f"placement {first:g}; expected them to agree within {tolerance:g}, so find out which is right "
            "and remove the other"
        )

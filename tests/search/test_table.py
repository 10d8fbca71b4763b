"""Evaluation tables: what is collected and what is refused with the row named."""

from __future__ import annotations

import math

import pytest

from gearshift.placement import Placement, PlacementSpace
from gearshift.search.table import TableError, build_table
from gearshift.search.target import Target


def _row(placement: object, loss: object = 2.0, **more: object) -> dict[str, object]:
    return {"checkpoint": "abc", "data": "held-out", "placement": placement, "loss": loss, **more}


SPACE = PlacementSpace(3)


def test_collects_placements_values_and_the_teacher():
    rows = [_row("fa*3", 1.5, quality=0.2), _row(["fa", "gdn", "gdn"], 2.5, quality=0.1), _row("kda*3", 3)]
    table = build_table(rows, SPACE, "-loss")
    assert table.placements == tuple(Placement.parse(text) for text in ("fa*3", "fa gdn*2", "kda*3"))
    assert table.values.tolist() == [-1.5, -2.5, -3.0]
    assert (table.checkpoint, table.data, len(table)) == ("abc", "held-out", 3)
    assert (table.teacher_value, table.teacher_quality) == (-1.5, 0.2)
    assert str(table.target) == "-loss"


def test_without_the_teacher_there_is_no_teacher_value():
    table = build_table([_row("swa*3", 1.5, quality=0.2)], SPACE, Target.parse("quality"))
    assert table.teacher_value is table.teacher_quality is None
    assert table.values.tolist() == [0.2]


def test_agreeing_repeats_are_one_row():
    table = build_table([_row("fa*3", 2.0), _row("swa*3"), _row("fa fa fa", 2.00001)], SPACE, "-loss")
    assert (len(table), table.values[0]) == (2, -2.0)


@pytest.mark.parametrize(
    ("rows", "says"),
    [
        ([], "there are no evaluation rows"),
        ([_row("fa*3"), {"placement": "fa*3"}], "evaluation row 2 has no 'checkpoint'"),
        ([_row("fa*3", math.nan)], r"evaluation row 1 (fa*3): loss = nan; expected a finite number"),
        ([_row("fa*3", None)], "loss = None"),
        ([{"placement": "fa*3", "checkpoint": "abc", "data": "d"}], "(fa*3): no column 'loss'"),
        ([_row("fa*3"), _row("fa*4")], "row 2 (fa*4): the placement 'fa*4' has 4 layers; expected 3"),
        ([_row("fa*2 rwkv")], "unknown mixer 'rwkv'"),
        ([_row(7)], "evaluation row 1 (7)"),
        ([_row("fa*3"), _row("swa*3", checkpoint="xyz")], "row 2 (swa*3) has the checkpoint 'xyz'"),
        ([_row("fa*3"), _row("swa*3", data="other")], "has the data 'other', the rows before it 'held-out'"),
        (
            [_row("fa*3", 2.0), _row("swa*3"), _row("fa*3", 2.1)],
            "row 3 (fa*3) has the value -2.1, an earlier row of this placement -2;",
        ),
    ],
)
def test_rows_that_cannot_be_used_together_are_refused(rows, says):
    with pytest.raises(TableError) as caught:
        build_table(rows, SPACE, "-loss")
    assert says in str(caught.value)


def test_the_tolerance_for_repeats_can_be_widened():
    rows = [_row("fa*3", 2.0), _row("fa*3", 2.1)]
    assert len(build_table(rows, SPACE, "-loss", tolerance=0.1)) == 1

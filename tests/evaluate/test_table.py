from __future__ import annotations

import json

import pytest

from gearshift.errors import FileFormatError
from gearshift.evaluate.table import COLUMNS, EvaluationTableError, append_row, read_table, select_rows
from gearshift.placement import Placement


def row(placement: str = "fa*3", checkpoint: str = "c", data: str = "d", loss: float = 1.0) -> dict:
    values = {"checkpoint": checkpoint, "data": data, "placement": placement, "loss": loss}
    return dict.fromkeys(COLUMNS, 0) | values


def test_no_file_is_an_empty_table(tmp_path):
    assert read_table(tmp_path / "none.jsonl") == []


def test_rows_come_back_in_order(tmp_path):
    path = tmp_path / "deep" / "table.jsonl"
    rows = [row("fa*3"), row("gdn*3")]
    for one in rows:
        append_row(path, one)
    assert read_table(path) == rows


def test_a_torn_last_line_is_left_out_and_then_replaced(tmp_path):
    path = tmp_path / "table.jsonl"
    append_row(path, row("fa*3"))
    with path.open("a") as file:
        file.write('{"checkpoint": "c", "da')
    assert len(read_table(path)) == 1
    append_row(path, row("gdn*3"))
    assert [r["placement"] for r in read_table(path)] == ["fa*3", "gdn*3"]


def test_a_row_has_exactly_the_columns(tmp_path):
    with pytest.raises(AssertionError):
        append_row(tmp_path / "table.jsonl", row() | {"colour": 1})


@pytest.mark.parametrize(
    ("line", "error", "told"),
    [
        ("nonsense\n", FileFormatError, "line 2"),
        ('{"checkpoint": 1}\n', EvaluationTableError, "row 2: no 'data'"),
        ("BAD_PLACEMENT", EvaluationTableError, "row 2: .*unknown mixer 'xyz'"),
        ("NO_TEXT", EvaluationTableError, "row 2"),
    ],
)
def test_a_row_that_is_none_is_named(tmp_path, line, error, told):
    path = tmp_path / "table.jsonl"
    append_row(path, row())
    if line.isupper():
        append_row(path, row("xyz*3") if line == "BAD_PLACEMENT" else row() | {"placement": 3})
    else:
        with path.open("a") as file:
            file.write(line)
    with pytest.raises(error, match=told):
        read_table(path)


def test_rows_are_selected_by_checkpoint_and_data():
    rows = [
        row("fa*3"),
        row("gdn*3", checkpoint="x"),
        row("gdn*3", data="x"),
        row("swa*3"),
        row("fa fa*2", loss=1.0001),
    ]
    selected = select_rows(rows, "c", "d")
    assert set(selected) == {Placement.parse("fa*3"), Placement.parse("swa*3")}
    assert selected[Placement.parse("fa*3")]["loss"] == 1.0
    with pytest.raises(EvaluationTableError, match="row 6: the placement fa\\*3 has the loss 2, an earlier"):
        select_rows([*rows, row("fa*3", loss=2.0)], "c", "d")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), None, "1"])
def test_a_quality_that_is_no_number_is_named(tmp_path, value):
    path = tmp_path / "table.jsonl"
    append_row(path, row())
    with path.open("a") as file:  # as another program may write it
        file.write(json.dumps(row("gdn*3") | {"quality": value}) + "\n")
    with pytest.raises(EvaluationTableError, match=r"row 2 \(gdn\*3\): quality = .*expected a finite number"):
        read_table(path)

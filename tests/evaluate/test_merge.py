"""Shards: parts that make up the whole, merged into the table that one run would write."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gearshift.evaluate import merge
from gearshift.evaluate.merge import merge_tables
from gearshift.evaluate.shard import Shard, ShardError
from gearshift.evaluate.table import EvaluationTableError, append_row, read_table
from gearshift.placement import Placement, PlacementSpace
from tests.evaluate.test_table import row

PLACEMENTS = list(PlacementSpace(2).all_placements())


@given(st.integers(0, 16), st.integers(1, 6))
def test_shards_are_a_partition_in_order(size, count):
    given = PLACEMENTS[:size]
    parts = [Shard(index, count).part(given) for index in range(1, count + 1)]
    assert [placement for part in parts for placement in part] == given
    assert max(map(len, parts)) - min(map(len, parts)) <= 1


def test_a_shard_is_read():
    assert Shard.parse(" 2/4") == Shard(2, 4)
    for wrong in ("0/4", "5/4", "1", "a/b", "1/0", "-1/2"):
        with pytest.raises(ShardError, match=r"expected a part of some, such as 1/4"):
            Shard.parse(wrong)


@pytest.fixture
def tables(tmp_path: Path) -> list[Path]:
    paths = [tmp_path / "a.jsonl", tmp_path / "b.jsonl"]
    for path, placements in zip(paths, (("fa*3", "gdn*3"), ("fa*3", "swa*3")), strict=True):
        for text in placements:
            append_row(path, row(text))
    return paths


def test_rows_that_agree_are_kept_once(tables, tmp_path):
    merged = merge_tables(tables, tmp_path / "all.jsonl")
    assert [one["placement"] for one in read_table(tmp_path / "all.jsonl")] == ["fa*3", "gdn*3", "swa*3"]
    assert (merged.rows, merged.duplicates, merged.torn) == (3, 1, ())
    assert merged.notes() == ["1 rows were there twice and agree; the first of each was kept"]
    assert merge_tables([tmp_path / "all.jsonl", tables[0]], tmp_path / "all.jsonl").rows == 3


def test_rows_that_contradict_each_other_are_named_and_nothing_is_written(tables, tmp_path):
    append_row(tables[1], row("gdn fa*2", loss=2.0))
    append_row(tables[1], row("gdn*3", loss=2.0))
    with pytest.raises(
        EvaluationTableError, match=r"b.jsonl, row 4: the placement gdn\*3 has the loss 2, an"
    ):
        merge_tables(tables, tmp_path / "all.jsonl")
    assert not (tmp_path / "all.jsonl").exists()


def test_other_checkpoints_are_kept_apart_and_told(tables, tmp_path):
    append_row(tables[1], row("gdn*3", checkpoint="x", loss=2.0))
    merged = merge_tables(tables, tmp_path / "all.jsonl")
    assert merged.rows == 4
    assert merged.notes()[-1].endswith("not to be compared: 3 of c on d, 1 of x on d")


def test_a_torn_table_is_told(tables, tmp_path):
    with tables[0].open("a") as file:
        file.write(json.dumps(row("kda*3"))[:20])
    merged = merge_tables(tables, tmp_path / "all.jsonl")
    assert merged.torn == (tables[0],)
    assert f"{tables[0]} ends within a row, which was left out: run that shard again" in merged.notes()


def test_a_missing_table_is_named(tables, tmp_path):
    with pytest.raises(EvaluationTableError, match=r"c.jsonl is missing"):
        merge_tables([*tables, tmp_path / "c.jsonl"], tmp_path / "all.jsonl")


def test_an_interrupted_merge_leaves_what_was_there(tables, tmp_path, monkeypatch):
    before = tables[0].read_bytes()

    def interrupted(value):
        raise KeyboardInterrupt

    monkeypatch.setattr(merge.json, "dumps", interrupted)
    with pytest.raises(KeyboardInterrupt):
        merge_tables(tables, tables[0])
    assert tables[0].read_bytes() == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.jsonl", "b.jsonl"]


def test_placements_are_read_the_same_however_they_are_written(tables, tmp_path):
    append_row(tables[1], row(str(Placement.parse("gdn*3")).replace("*3", " gdn gdn")))
    assert merge_tables(tables, tmp_path / "all.jsonl").duplicates == 2

"""``gearshift evaluate``: rows in a table, resumed where they end, and what is refused."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from itertools import islice
from pathlib import Path

import pytest
from typer.testing import Result

from gearshift.cli.options import random_placements
from gearshift.evaluate import quality
from gearshift.files import read_json_lines
from gearshift.inspect_directory import supernet_space
from gearshift.placement import Placement, PlacementSpace
from gearshift.presets import Preset, write_presets

Gearshift = Callable[..., Result]


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "held_out.py"
    path.write_text("def add(a, b):\n    return a + b\n\n\n" * 30)
    return path


@pytest.fixture
def evaluate(gearshift: Gearshift, supernet_directory: Path, text: Path, tmp_path: Path) -> Gearshift:
    """The command with small sizes; give it more options."""
    small = ("--tokens", 64, "--sequence-length", 32, "--out", tmp_path / "rows.jsonl")
    return lambda *options: gearshift("evaluate", supernet_directory, "--data", text, *small, *options)


def test_rows_are_written_once(evaluate: Gearshift, tmp_path: Path):
    first = evaluate("--placement", "gdn*3")
    assert first.exit_code == 0
    rows = read_json_lines(tmp_path / "rows.jsonl")
    assert [row["placement"] for row in rows] == ["fa*3", "gdn*3"]
    again = evaluate("--placement", "gdn*3", "--placement", "swa kda fa")
    assert [row["placement"] for row in read_json_lines(tmp_path / "rows.jsonl")[2:]] == ["swa kda fa"]
    assert "gdn*3" in again.stdout
    assert f"{rows[1]['loss']:.4f}" in again.stdout


def test_shards_make_up_the_table_of_one_run(evaluate: Gearshift, gearshift: Gearshift, tmp_path: Path):
    result = evaluate("--random", 5)
    assert "an hour; plain forward passes take" in result.stdout
    whole = {row["placement"]: row["loss"] for row in read_json_lines(tmp_path / "rows.jsonl")}
    parts = [tmp_path / f"part{index}.jsonl" for index in (1, 2)]
    for index, part in enumerate(parts, start=1):
        assert evaluate("--random", 5, "--shard", f"{index}/2", "--out", part).exit_code == 0
    merged = gearshift("evaluate", "merge", *parts, "--out", tmp_path / "merged.jsonl")
    assert merged.exit_code == 0
    assert "1 rows were there twice and agree" in merged.stdout
    rows = read_json_lines(tmp_path / "merged.jsonl")
    assert {row["placement"]: row["loss"] for row in rows} == whole
    assert len(rows) == len(whole)


def test_random_placements_follow_the_seed(evaluate: Gearshift, supernet_directory: Path, tmp_path: Path):
    assert evaluate("--random", 4, "--seed", 3).exit_code == 0
    texts = {row["placement"] for row in read_json_lines(tmp_path / "rows.jsonl")}
    drawn = islice(random_placements(supernet_space(supernet_directory), 3), 4)
    assert {str(placement) for placement in drawn} <= texts


def test_a_small_space_runs_out_of_random_placements():
    space = PlacementSpace(2, ("full_attention", "gated_delta_net"))
    assert set(random_placements(space, 0)) == set(space.all_placements())


def test_presets_are_evaluated(gearshift: Gearshift, supernet_directory: Path, text: Path, tmp_path: Path):
    supernet = shutil.copytree(supernet_directory, tmp_path / "supernet")
    write_presets(supernet, [Preset("fast", Placement.parse("kda*3"))])
    out = tmp_path / "rows.jsonl"
    small = ("--tokens", 64, "--sequence-length", 32)
    assert gearshift("evaluate", supernet, "--data", text, "--out", out, "--presets", *small).exit_code == 0
    assert [row["placement"] for row in read_json_lines(out)] == ["fa*3", "kda*3"]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ([], "no placement to evaluate; give --placement, --presets or --random"),
        (["--placement", "fa*4"], "has 4 layers; expected 3"),
        (["--placement", "fa*3", "--data", "nowhere.txt"], "nowhere.txt"),
        (["--placement", "fa*3", "--recall", "nowhere.jsonl"], "nowhere.jsonl"),
        (["--placement", "fa*3", "--shard", "3/2"], "the shard '3/2'; expected a part of some"),
    ],
)
def test_wrong_options_are_refused(options: list[str], said: str, evaluate: Gearshift, tmp_path: Path):
    result = evaluate(*options)
    assert result.exit_code == 1
    assert result.stderr.startswith("error: ")
    assert said in result.stderr
    assert not (tmp_path / "rows.jsonl").exists()


def test_a_table_that_cannot_be_written_is_refused_before_anything_is_loaded(
    evaluate: Gearshift, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(quality, "load_supernet", None)
    (tmp_path / "file").touch()
    result = evaluate("--placement", "gdn*3", "--out", tmp_path / "file" / "rows.jsonl")
    assert result.exit_code == 1
    assert f"{tmp_path / 'file'} is no folder; give another path" in result.stderr


def test_a_table_that_is_none_is_left_as_it_is(evaluate: Gearshift, tmp_path: Path):
    (tmp_path / "rows.jsonl").write_text('{"placement": "fa*3"}\n')
    result = evaluate("--placement", "fa*3")
    assert result.exit_code == 1
    assert "row 1: no 'checkpoint'" in result.stderr
    assert (tmp_path / "rows.jsonl").read_text() == '{"placement": "fa*3"}\n'

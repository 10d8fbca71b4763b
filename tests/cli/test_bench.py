"""``gearshift bench``: rows that a search can read, and what is refused."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from typer.testing import Result

from gearshift.bench import decode
from gearshift.files import read_json_lines
from gearshift.inspect_directory import supernet_space
from gearshift.search import fit_costs
from gearshift.search.cost_rows import read_cost_rows

Gearshift = Callable[..., Result]


def test_a_cost_model_can_be_fitted_to_what_is_measured_unasked(
    gearshift: Gearshift, supernet_directory: Path, tmp_path: Path
):
    out = tmp_path / "cost.jsonl"
    result = gearshift("bench", supernet_directory, "--out", out, "--context", 16, "--context", 64)
    assert result.exit_code == 0
    costs = fit_costs(read_json_lines(out), supernet_space(supernet_directory))
    assert set(costs) == {(16, 1), (64, 1)}


def test_as_many_sequences_run_as_fit_and_prompts_are_timed(
    gearshift: Gearshift, supernet_directory: Path, tmp_path: Path
):
    out, memory = tmp_path / "cost.jsonl", 60_000
    sizes = ("--context", 32, "--memory", memory / 2**30, "--prefill")
    assert gearshift("bench", supernet_directory, "--out", out, *sizes).exit_code == 0
    rows = read_json_lines(out)
    assert len({row["batch_size"] for row in rows}) > 1
    for row in rows:
        assert row["memory_bytes"] == memory
        assert row["batch_size"] == memory // row["cache_bytes"]
        assert row["prefill_seconds"] > 0
    steps = read_cost_rows(rows).steps
    assert {step.workload for step in steps} == {(32, None, memory)}
    too_little = gearshift("bench", supernet_directory, "--out", out, "--memory", 1e-7)
    assert too_little.exit_code == 1
    assert "the memory for caches is 107: give more of it" in too_little.stderr


def test_named_placements_are_added_to_the_file(
    gearshift: Gearshift, supernet_directory: Path, tmp_path: Path
):
    out = tmp_path / "cost.jsonl"
    command = ("bench", supernet_directory, "--out", out, "--context", 16, "--batch", 2, "--placement")
    assert gearshift(*command, "gdn*3").exit_code == 0
    assert gearshift(*command, "swa*3").exit_code == 0
    rows = read_json_lines(out)
    assert [row["placement"] for row in rows] == ["fa*3", "gdn*3", "fa*3", "swa*3"]
    assert {row["batch_size"] for row in rows} == {2}


@pytest.mark.parametrize(
    ("options", "code", "said"),
    [
        (["--context", "3"], 1, "error: context length 3; expected more than"),
        (["--placement", "fa*9"], 1, "has 9 layers; expected 3"),
        (["--device", "tpu"], 2, "'tpu' is not one of"),
        (["--batch", "0"], 2, "--batch"),
    ],
)
def test_wrong_options_are_refused(
    options: list[str], code: int, said: str, gearshift: Gearshift, supernet_directory: Path, tmp_path: Path
):
    result = gearshift("bench", supernet_directory, "--out", tmp_path / "cost.jsonl", *options)
    assert result.exit_code == code
    assert said in result.stderr
    assert not (tmp_path / "cost.jsonl").exists()


def test_a_file_that_cannot_be_written_is_refused_before_anything_is_measured(
    gearshift: Gearshift, supernet_directory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(decode, "measure_decode", None)
    result = gearshift("bench", supernet_directory, "--out", tmp_path)
    assert result.exit_code == 1
    assert f"{tmp_path} is a folder; expected a file to append rows to" in result.stderr

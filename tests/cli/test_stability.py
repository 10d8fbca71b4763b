"""``gearshift stability``: tables with their steps, and what is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
from typer.testing import Result

from gearshift.cli.options import random_placements
from gearshift.placement import MIXERS, PlacementSpace

Gearshift = Callable[..., Result]


def write_table(path: Path, digest: str, slope: float) -> Path:
    rows: list[dict[str, Any]] = []
    for placement in islice(random_placements(PlacementSpace(3), 0), 12):
        rank = sum((layer + 1) * slope * MIXERS.index(mixer) for layer, mixer in enumerate(placement))
        loss = 1 + rank + 0.5 * MIXERS.index(placement[0])
        rows.append({"checkpoint": digest, "data": "d", "placement": str(placement), "loss": loss})
    with path.open("a") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)
    return path


@pytest.fixture
def tables(tmp_path: Path) -> tuple[Path, Path]:
    return write_table(tmp_path / "a.jsonl", "aaaa", 0.01), write_table(tmp_path / "b.jsonl", "bbbb", 1.0)


def test_tables_with_steps_are_compared(gearshift: Gearshift, tables: tuple[Path, Path], tmp_path: Path):
    out = tmp_path / "stability.json"
    result = gearshift("stability", f"100={tables[0]}", f"200={tables[1]}", "--out", out)
    assert result.exit_code == 0, result.stderr
    assert "12 placements, Kendall's W" in result.stdout
    (run,) = json.loads(out.read_text())["runs"]
    assert [one["step"] for one in run["checkpoints"]] == [100, 200]
    assert run["checkpoints"][1]["spearman"]["value"] == pytest.approx(1)


def test_one_table_of_several_checkpoints_takes_labels(gearshift: Gearshift, tmp_path: Path):
    table = write_table(write_table(tmp_path / "all.jsonl", "aaaa", 0.01), "bbbb", 1.0)
    labels = ("--label", "aa=100@3", "--label", "bb=200@3")
    assert gearshift("stability", table, *labels, "--out", tmp_path / "s.json").exit_code == 0
    assert json.loads((tmp_path / "s.json").read_text())["runs"][0]["seed"] == 3


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["{a}"], "has the checkpoint aaaa, for which 0 labels stand; give one: --label aaaa=STEP"),
        (["late={a}", "200={b}"], "the step 'late'; expected a number"),
        (["100={a}", "100={b}"], "step 100 of seed 0 is there already"),
        (["100={a}"], "seed 0 has 1 checkpoint"),
        (["100={a}", "200=nowhere.jsonl"], "nowhere.jsonl is missing or holds no rows"),
        (["100={a}", "200={b}", "--label", "aaaa"], "expected two parts with '=' between them"),
        (["100={a}", "200={b}", "--costs", "nowhere.json"], "nowhere.json is missing"),
    ],
)
def test_wrong_arguments_are_refused(
    arguments: list[str], said: str, gearshift: Gearshift, tables: tuple[Path, Path], tmp_path: Path
):
    given = [text.format(a=tables[0], b=tables[1]) for text in arguments]
    result = gearshift("stability", *given, "--batch", 1, "--out", tmp_path / "s.json")
    assert result.exit_code == 1
    assert said in result.stderr
    assert not (tmp_path / "s.json").exists()

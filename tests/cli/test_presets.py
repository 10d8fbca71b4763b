"""``gearshift presets build``: presets.json from rows, and from evaluations and measurements of its own."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from typer.testing import Result

from gearshift.files import read_json_lines
from gearshift.inspect_directory import weight_bytes
from gearshift.placement import MIXERS, PlacementSpace
from gearshift.presets import read_presets

Gearshift = Callable[..., Result]


@pytest.fixture
def supernet(supernet_directory: Path, tmp_path: Path) -> Path:
    return shutil.copytree(supernet_directory, tmp_path / "supernet")


@pytest.fixture
def build(gearshift: Gearshift, supernet: Path, tmp_path: Path) -> Gearshift:
    """The command on rows of every placement, in which later mixers lose more and run faster."""
    with (tmp_path / "rows.jsonl").open("w") as table, (tmp_path / "cost.jsonl").open("w") as cost:
        for placement in PlacementSpace(3).all_placements():
            rank = sum(MIXERS.index(mixer) * (3 + layer) for layer, mixer in enumerate(placement)) / 100
            row = {"checkpoint": "c", "data": "d", "placement": str(placement), "loss": 1 + rank, "kl": rank}
            row |= {
                "quality": 0.3,
                "retention": 0.9,
                "recall": {},
                "tokens": 1,
                "seconds": 1,
                "provenance": {},
            }
            table.write(json.dumps(row) + "\n")
            steps = {"batch_size": 1, "hardware": "h", "placement": str(placement)}
            for context in (16, 32):
                seconds = 1 - 0.01 * context * rank
                row = {**steps, "context_length": context, "seconds_per_step": seconds}
                cost.write(json.dumps(row) + "\n")
    rows = ("--table", tmp_path / "rows.jsonl", "--cost", tmp_path / "cost.jsonl")
    return lambda *options: gearshift("presets", "build", supernet, *rows, *options)


def test_a_preset_for_each_workload_and_retention(build: Gearshift, supernet: Path):
    result = build("--retention", 95, "--retention", 85)
    assert result.exit_code == 0, result.stderr
    assert "next: gearshift thin" in result.stdout
    assert "--presets r95-16x1,r85-16x1,r95-32x1,r85-32x1" in result.stdout
    presets = read_presets(supernet)
    assert list(presets) == ["teacher", "r95-16x1", "r85-16x1", "r95-32x1", "r85-32x1"]
    assert [m.workload.context_length for m in presets["r95-16x1"].measurements] == [16, 32]
    assert build("--context", 32, "--retention", 90).exit_code == 0
    assert list(read_presets(supernet)) == ["teacher", "r90"]


def test_a_ceiling_is_what_thin_then_takes(
    build: Gearshift, gearshift: Gearshift, supernet: Path, tmp_path: Path
):
    mixers, shared = weight_bytes(supernet)
    ceiling = shared + sum(mixers.values()) // 2
    options = ("--context", 32, "--retention", 98, "--retention", 85)
    assert build(*options, "--ceiling", ceiling).exit_code == 0
    names = ",".join(list(read_presets(supernet))[1:])
    assert gearshift("thin", supernet, tmp_path / "thin", "--presets", names).exit_code == 0
    kept, same = weight_bytes(tmp_path / "thin")
    assert same == shared
    assert shared + sum(kept.values()) <= ceiling
    result = build(*options, "--ceiling", shared + 1)
    assert result.exit_code == 1
    assert f"the weights may take {shared + 1:,} bytes; r98, r85 need at least" in result.stderr


def test_presets_are_evaluated_and_measured(
    gearshift: Gearshift, supernet: Path, build: Gearshift, tmp_path: Path
):
    text = tmp_path / "held_out.py"
    text.write_text("def add(a, b):\n    return a + b\n\n\n" * 30)
    new = tmp_path / "new.jsonl"
    small = ("--data", text, "--tokens", 64, "--sequence-length", 32)
    assert gearshift("evaluate", supernet, "--out", new, "--random", 20, *small).exit_code == 0
    result = build("--table", new, *small, "--target", "-kl", "--context", 32, "--retention", 99.9)
    assert result.exit_code == 0, result.stderr
    preset = read_presets(supernet)["r99.9"]
    evaluated = {row["placement"]: row["retention"] for row in read_json_lines(new)}
    assert preset.retention == evaluated[str(preset.placement)]
    assert preset.retention is not None
    assert preset.retention >= 0.999 or "WARNING: r99.9 keeps" in result.stdout
    assert [(m.workload.context_length, m.workload.concurrency) for m in preset.measurements] == [(32, 1)]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--retention", "0"], "expected different shares of the teacher's quality"),
        (["--retention", "101"], "expected different shares of the teacher's quality"),
        (["--context", "64"], "no decode step was measured at context length 64; measured are [16, 32]"),
        (["--table", "nowhere.jsonl"], "nowhere.jsonl is missing or holds no rows"),
        (["--retention", "97", "--at-most", "fa=0"], "ask for less"),
        (["--target", "bits"], "no column 'bits'"),
    ],
)
def test_what_cannot_be_had_is_refused(options: list[str], said: str, build: Gearshift, supernet: Path):
    result = build(*options)
    assert result.exit_code == 1
    assert said in result.stderr
    assert not (supernet / "presets.json").exists()

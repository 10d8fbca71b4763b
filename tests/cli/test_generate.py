"""``gearshift generate``: side by side, and what it refuses before loading anything."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from typer.testing import Result

from gearshift.placement import Placement
from gearshift.presets import Preset, write_presets

Gearshift = Callable[..., Result]


@pytest.fixture
def supernet(supernet_directory: Path, tmp_path: Path) -> Path:
    directory = shutil.copytree(supernet_directory, tmp_path / "supernet")
    write_presets(
        directory, [Preset("good", Placement.parse("fa*3")), Preset("fast", Placement.parse("gdn*3"))]
    )
    return directory


def test_presets_and_placements_are_shown_with_their_speed(gearshift: Gearshift, supernet: Path):
    result = gearshift(
        "generate", supernet, "x = 1", "--preset", "fast", "--placement", "swa fa*2", "--max-new-tokens", 3
    )
    assert result.exit_code == 0
    headings = [line for line in result.stdout.splitlines() if line.startswith("---")]
    assert [heading.split(":")[0] for heading in headings] == ["--- fast", "--- swa fa*2"]
    assert all(heading.endswith("tokens/s") for heading in headings)
    assert result.stdout.count("x = 1") == 2


def test_all_presets_run_when_none_is_named(gearshift: Gearshift, supernet: Path):
    result = gearshift("generate", supernet, "x", "--max-new-tokens", 1)
    assert "--- good: fa*3" in result.stdout
    assert "--- fast: gdn*3" in result.stdout


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--preset", "quick"], "no preset 'quick'; this supernet's presets: good, fast"),
        (["--placement", "fa*4"], "has 4 layers; expected 3"),
        (["--placement", "fa*2 mamba"], "unknown mixer 'mamba'"),
        (["--max-new-tokens", "1000"], "at most 128 together"),
    ],
)
def test_wrong_options_are_refused(options: list[str], said: str, gearshift: Gearshift, supernet: Path):
    result = gearshift("generate", supernet, "x", *options)
    assert result.exit_code == 1
    assert result.stderr.startswith("error: ")
    assert said in result.stderr


def test_a_teacher_or_nothing_is_refused(gearshift: Gearshift, teacher_directory: Path, tmp_path: Path):
    teacher = gearshift("generate", teacher_directory, "x")
    assert teacher.exit_code == 1
    assert "make a supernet of it with gearshift convert" in teacher.stderr
    assert "it has no config.json" in gearshift("generate", tmp_path, "x").stderr


def test_a_supernet_without_a_tokenizer_is_refused_in_one_line(gearshift: Gearshift, supernet: Path):
    for path in supernet.glob("tokenizer*"):
        path.unlink()
    result = gearshift("generate", supernet, "def f", "--placement", "fa*3")
    assert result.exit_code == 1
    (line,) = result.stderr.splitlines()
    assert line.startswith(f"error: {supernet} holds no tokenizer (")
    assert line.endswith("; copy the teacher's there")


def test_damaged_presets_are_refused(gearshift: Gearshift, supernet: Path):
    (supernet / "presets.json").write_text("{")
    result = gearshift("generate", supernet, "x")
    assert result.exit_code == 1
    assert "presets.json is not valid JSON" in result.stderr

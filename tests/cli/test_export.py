"""``gearshift export`` and ``gearshift thin``: what they say, and what they refuse."""

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
    """A supernet with presets."""
    supernet = shutil.copytree(supernet_directory, tmp_path / "supernet")
    placements = {"teacher": "fa*3", "good": "fa swa*2", "fast": "gdn*3"}
    write_presets(supernet, [Preset(name, Placement.parse(text)) for name, text in placements.items()])
    return supernet


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--preset", "teacher"], ["LlamaForCausalLM (fa*3)", "what loads the teacher loads it"]),
        (["--placement", "swa*3"], ["MistralForCausalLM (swa*3)", "heeds sliding_window of this class"]),
        (["--preset", "good"], ["MinistralForCausalLM (fa swa*2)", "heeds layer_types and sliding_window"]),
        (
            ["--preset", "fast"],
            ["supernet (gdn*3)", "computes this placement: layer 0 is gdn", "'import gearshift'"],
        ),
    ],
)
def test_it_says_what_it_wrote_and_what_loads_it(
    options: list[str], said: list[str], gearshift: Gearshift, supernet: Path, tmp_path: Path
):
    result = gearshift("export", supernet, tmp_path / "out", *options)
    assert result.exit_code == 0
    assert f"written to {tmp_path / 'out'}" in result.stdout
    assert all(text in result.stdout for text in said)
    assert result.stdout.endswith(f"next: gearshift info {tmp_path / 'out'}\n")
    assert gearshift("info", tmp_path / "out").exit_code == 0


def test_an_older_supernets_teacher(gearshift: Gearshift, supernet: Path, tmp_path: Path):
    (supernet / "teacher_config.json").unlink()
    result = gearshift("export", supernet, tmp_path / "out", "--preset", "teacher")
    assert "it loads in what reads LlamaForCausalLM checkpoints" in result.stdout


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ([], "give either --preset or --placement"),
        (["--preset", "fast", "--placement", "fa*3"], "give either --preset or --placement"),
        (["--preset", "quick"], "no preset 'quick'; this supernet's presets: teacher, good, fast"),
        (["--placement", "fa*2"], "the placement 'fa*2' has 2 layers; expected 3"),
        (["--placement", "mamba*3"], "unknown mixer 'mamba'"),
    ],
)
def test_wrong_options_are_refused(
    options: list[str], said: str, gearshift: Gearshift, supernet: Path, tmp_path: Path
):
    result = gearshift("export", supernet, tmp_path / "out", *options)
    assert result.exit_code == 1
    assert result.stderr.startswith("error: ")
    assert said in result.stderr
    assert not (tmp_path / "out").exists()


def test_only_supernets_are_exported(gearshift: Gearshift, teacher_directory: Path, tmp_path: Path):
    result = gearshift("export", teacher_directory, tmp_path / "out", "--placement", "fa*3")
    assert result.exit_code == 1
    assert "holds a model of type 'llama'; expected 'gearshift_supernet'" in result.stderr
    assert (
        "expected 'gearshift_supernet'" in gearshift("thin", teacher_directory, "x", "--presets", "a").stderr
    )


def test_thinning_says_what_it_saved(gearshift: Gearshift, supernet: Path, tmp_path: Path):
    result = gearshift("thin", supernet, tmp_path / "thin", "--presets", "fast, good")
    assert result.exit_code == 0
    assert "saved, " in result.stdout
    assert "presets: good, fast; default placement: gdn*3" in result.stdout
    assert "the teacher is not among its placements" in result.stdout
    assert gearshift("info", tmp_path / "thin").exit_code == 0
    kept = gearshift("thin", supernet, tmp_path / "kept", "--presets", "fast,teacher")
    assert "the teacher is not among" not in kept.stdout


def test_thinning_to_no_preset_or_an_unknown_one(gearshift: Gearshift, supernet: Path, tmp_path: Path):
    for presets, said in (("quick", "presets: teacher, good, fast"), (" ,", "no preset is named")):
        result = gearshift("thin", supernet, tmp_path / "thin", "--presets", presets)
        assert result.exit_code == 1
        assert said in result.stderr
    assert not (tmp_path / "thin").exists()

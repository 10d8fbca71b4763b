"""``gearshift demo``: the whole road on a tiny teacher, and what it refuses."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest
from typer.testing import Result

import gearshift.demo as demo
from gearshift.presets import read_presets

Gearshift = Callable[..., Result]


def test_a_teacher_that_is_not_there_is_refused(gearshift: Gearshift, tmp_path: Path):
    result = gearshift("demo", "--teacher", tmp_path / "nowhere", "--out", tmp_path / "demo")
    assert result.exit_code == 1
    assert "error: no teacher at" in result.stderr
    assert not (tmp_path / "demo" / "converted").exists()


@pytest.fixture
def small_demo(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The demo with a few seconds of everything, for a teacher of three layers and 128 positions."""
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        "save_every: 2\ndevice: cpu\nstages:\n"
        "  - {stage: align, steps: 2, batch_size: 2, sequence_length: 32, packing: stream}\n"
        "  - {stage: distill, steps: 2, batch_size: 2, sequence_length: 32, packing: stream}\n"
    )
    small = {
        "RECIPE": recipe,
        "TRAINING_DOCUMENTS": 3,
        "RECALL_TEXTS_PER_TASK": 1,
        "FITTED": 24,
        "JUDGED": 12,
        "QUICK_TOKENS": 128,
        "FINAL_TOKENS": 128,
        "SEQUENCE_TOKENS": 64,
        "RECALL_LENGTHS": (200,),
        "RECALL_EXAMPLES": 1,
        "CONTEXT_LENGTHS": (16, 96),
        "DECODE_BATCH": 1,
        "ROUNDS": 1,
        "PROMPT_TOKENS": 4,
    }
    for name, value in small.items():
        monkeypatch.setattr(demo, name, value)


def test_the_whole_road(
    small_demo: None,
    gearshift: Gearshift,
    teacher_directory: Path,
    tmp_path: Path,
    capfd: pytest.CaptureFixture,
):
    out = tmp_path / "demo"
    result = gearshift("demo", "--teacher", teacher_directory, "--out", out)
    printed = result.output + capfd.readouterr().out
    assert result.exit_code == 0, result.stderr
    distance = re.search(r"largest difference of a logit: (\S+)", printed)
    assert distance is not None and float(distance[1]) < 1e-4
    assert "held out:" in printed and "try next:" in printed
    presets = read_presets(out / "distilled" / "supernet")
    assert next(iter(presets)) == "teacher"
    for preset in presets.values():
        assert preset.name in printed and preset.retention is not None
        assert [m.workload.context_length for m in preset.measurements] == [16, 96]
    assert json.loads((out / "frontier" / "frontier.json").read_text())["points"]
    assert (out / "frontier" / "frontier.html").exists() and (out / "frontier" / "frontier.png").exists()


def test_an_interrupted_demo_goes_on_where_it_was(
    small_demo: None,
    gearshift: Gearshift,
    teacher_directory: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
):
    out = tmp_path / "demo"

    def stop(*arguments: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(demo, "_evaluate", stop)
        assert gearshift("demo", "--teacher", teacher_directory, "--out", out).exit_code != 0
    done = [out / "converted" / "config.json", out / "distilled" / "supernet" / "model.safetensors"]
    before = [path.stat().st_mtime_ns for path in done]
    assert gearshift("demo", "--teacher", teacher_directory, "--out", out).exit_code == 0
    assert [path.stat().st_mtime_ns for path in done] == before

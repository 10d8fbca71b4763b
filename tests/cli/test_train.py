"""``gearshift train``: a run, a Ctrl-C in the middle of one, and what is refused."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from typer.testing import Result

from gearshift.files import read_json_lines
from gearshift.inspect_directory import inspect_directory

Gearshift = Callable[..., Result]


@pytest.fixture
def recipe(supernet_directory: Path, tmp_path: Path) -> Path:
    """Two steps on a few lines of text; the run directory is ``run`` beside the recipe."""
    (tmp_path / "text.py").write_text("def add(a, b):\n    return a + b\n\n\n" * 20)
    path = tmp_path / "recipe.yaml"
    path.write_text(
        f"supernet: {supernet_directory}\n"
        f"out: {tmp_path / 'run'}\n"
        f"data: [{tmp_path / 'text.py'}]\n"
        "stages: [{stage: distill, steps: 2, batch_size: 1, sequence_length: 16}]\n"
    )
    return path


def test_a_run_ends_with_a_supernet(gearshift: Gearshift, recipe: Path, tmp_path: Path):
    result = gearshift("train", recipe, "--set", "stages.0.steps=3")
    assert result.exit_code == 0
    assert f"supernet written to {tmp_path / 'run' / 'supernet'}" in result.stdout
    assert inspect_directory(tmp_path / "run").facts["step"] == "3"
    assert inspect_directory(tmp_path / "run" / "supernet").missing == []


@pytest.mark.parametrize(
    ("setting", "said"),
    [
        ("stages.0.stepps=3", "unknown key 'stages.0.stepps'; did you mean 'steps'?"),
        ("stages.0.steps=-1", "stages.0.steps: given -1"),
        ("seed", "the override 'seed'; expected key=value"),
        ("supernet=nowhere", "no supernet at nowhere"),
        ("data=[nowhere.py]", "nowhere.py"),
    ],
)
def test_wrong_settings_are_refused(
    setting: str, said: str, gearshift: Gearshift, recipe: Path, tmp_path: Path
):
    result = gearshift("train", recipe, "--set", setting)
    assert result.exit_code == 1
    assert said in result.stderr
    assert not (tmp_path / "run").exists()


def test_a_missing_recipe_and_a_run_that_is_there_are_refused(
    gearshift: Gearshift, recipe: Path, tmp_path: Path
):
    assert "nowhere.yaml is missing" in gearshift("train", tmp_path / "nowhere.yaml").stderr
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "metrics.jsonl").write_text("")
    refused = gearshift("train", recipe)
    assert refused.exit_code == 1
    assert "already exists; go on with --resume" in refused.stderr


def test_ctrl_c_keeps_a_checkpoint_and_resume_ends_the_run(
    gearshift: Gearshift, recipe: Path, tmp_path: Path
):
    command = [sys.executable, "-m", "gearshift", "train", str(recipe), "--set", "stages.0.steps=80"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        _wait_for_step(tmp_path / "run" / "metrics.jsonl", process)
        process.send_signal(signal.SIGINT)
        _, said = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "stopped: the last checkpoint is in the run directory" in said
    done = len(read_json_lines(tmp_path / "run" / "metrics.jsonl"))
    assert 1 <= done < 80
    assert "go on with --resume" in inspect_directory(tmp_path / "run").missing[0]
    assert gearshift("train", recipe, "--set", "stages.0.steps=80", "--resume").exit_code == 0
    rows = read_json_lines(tmp_path / "run" / "metrics.jsonl")
    assert [row["step"] for row in rows] == list(range(1, 81))


def _wait_for_step(metrics: Path, process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 120
    while process.poll() is None and time.monotonic() < deadline:
        if metrics.exists() and read_json_lines(metrics):
            return
        time.sleep(0.05)
    pytest.fail(f"no step was logged; exit code {process.poll()}")

"""``gearshift runs show``: a table and a picture of what was logged."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from typer.testing import Result

Gearshift = Callable[..., Result]


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """Four steps of alignment, six of distillation, judged once."""
    rows = []
    for step in range(1, 11):
        stage = "align" if step <= 4 else "distill"
        mixers = {
            "gdn": {"activation": step / 10, "gradient_norm": 2.0},
            "swa": {"activation": None, "gradient_norm": 0},
        }
        row = {"step": step, "stage": stage, "loss": float(step), "mixers": mixers}
        rows.append(row | {"tokens": step * 1000, "tokens_per_second": 100.0})
    rows[-1]["held_out"] = {
        "teacher": {"loss": 1.0, "quality": 0.37, "retention": 1.0},
        "fast": {"loss": 1.1, "quality": 0.33, "retention": 0.905},
    }
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path / "run"


def test_the_table_has_means_that_span_no_two_stages(gearshift: Gearshift, run: Path):
    result = gearshift("runs", "show", run, "--parts", 4)
    assert result.exit_code == 0
    lines = [
        [cell.strip() for cell in line.split("│")[1:-1]] for line in result.stdout.splitlines() if "│" in line
    ]
    assert lines == [
        ["1-3", "align", "2.0000", "0.200", "3,000", "100", "-"],
        ["4-4", "align", "4.0000", "0.400", "4,000", "100", "-"],
        ["5-7", "distill", "6.0000", "0.600", "7,000", "100", "-"],
        ["8-10", "distill", "9.0000", "0.900", "10,000", "100", "90.5%"],
    ]


def test_the_picture_is_a_png(gearshift: Gearshift, run: Path, tmp_path: Path):
    pytest.importorskip("matplotlib")
    result = gearshift("runs", "show", run, "--plot", tmp_path / "curves.png")
    assert f"curves written to {tmp_path / 'curves.png'}" in result.stdout.replace("\n", "")
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")


def test_what_is_no_run_is_refused(gearshift: Gearshift, run: Path, tmp_path: Path):
    assert "is no run directory" in gearshift("runs", "show", tmp_path).stderr
    (run / "metrics.jsonl").write_text("")
    refused = gearshift("runs", "show", run)
    assert refused.exit_code == 1
    assert "the run has not finished a step yet" in refused.stderr

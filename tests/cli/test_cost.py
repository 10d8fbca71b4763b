"""``gearshift cost``: from measured rows to predictions, and what is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from typer.testing import Result

from gearshift.placement import Placement
from tests.search.cost_scene import draw, made_up_engine, make_rows

Gearshift = Callable[..., Result]


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Rows to fit, and rows to judge by."""
    engine, folder = made_up_engine(), tmp_path_factory.mktemp("cost")
    uniform = [Placement.uniform(mixer, 48) for mixer in engine.space.mixers]
    paths = folder / "fit.jsonl", folder / "judge.jsonl"
    for path, placements in zip(paths, ([*uniform, *draw(engine, 6, 1)], draw(engine, 6, 2)), strict=True):
        path.write_text("".join(json.dumps(row) + "\n" for row in make_rows(engine, placements, 0.01)))
    return paths


@pytest.fixture
def costs(gearshift: Gearshift, files: tuple[Path, Path], tmp_path: Path) -> Path:
    out = tmp_path / "costs.json"
    result = gearshift(
        "cost", "fit", files[0], "--out", out, "--held-out", files[1], "--report", tmp_path / "report.json"
    )
    assert result.exit_code == 0, result.stderr
    assert "held out: median" in result.stdout
    assert "published Reg" in result.stdout
    assert f"next: gearshift cost predict {out}" in result.stdout
    return out


def test_errors_are_written(costs: Path, tmp_path: Path):
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["held_out"]["median"] < 0.03
    assert report["provenance"]["command"]


def test_what_fits_is_predicted(costs: Path, gearshift: Gearshift):
    asked = ("--placement", "fa*12 swa*26 kda*6 gdn*4", "--context", 16384, "--context", 32768)
    result = gearshift("cost", "predict", costs, *asked, "--memory", 70)
    assert result.exit_code == 0
    text = " ".join(result.stdout.split())
    assert "a made-up GPU, 90% intervals" in text
    fits = [
        made_up_engine().largest_batch(Placement.parse(str(asked[1])), context, 70 * 2**30)
        for context in (16384, 32768)
    ]
    assert all(str(size) in text for size in fits)
    capped = gearshift("cost", "predict", costs, *asked, "--memory", 70, "--batch", 3)
    assert capped.exit_code == 0 and "tokens/s" in capped.stdout


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--context", "4096"], "how many sequences run? give --batch, --memory, or both"),
        (["--context", "4096", "--batch", "1", "--placement", "fa*3"], "has 3 layers; expected 48"),
        (["--context", "131072", "--memory", "1"], "the memory for caches is 1,073,741,824"),
        (["--context", "4096", "--batch", "1", "--prompt", "5000"], "exceed the context_length"),
    ],
)
def test_wrong_options_are_refused(options: list[str], said: str, costs: Path, gearshift: Gearshift):
    result = gearshift("cost", "predict", costs, *options)
    assert result.exit_code == 1
    assert said in result.stderr


def test_rows_that_are_none_are_refused(gearshift: Gearshift, tmp_path: Path):
    result = gearshift("cost", "fit", tmp_path / "none.jsonl", "--out", tmp_path / "costs.json")
    assert result.exit_code == 1
    assert "none.jsonl is missing or holds no rows; write some with gearshift bench" in result.stderr
    (tmp_path / "rows.jsonl").write_text('{"placement": "fa*3"}\n')
    result = gearshift("cost", "fit", tmp_path / "rows.jsonl", "--out", tmp_path / "costs.json")
    assert "measurement 1 has no 'context_length'" in result.stderr
    assert not (tmp_path / "costs.json").exists()

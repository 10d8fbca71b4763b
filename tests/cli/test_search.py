"""``gearshift search``: files and presets from rows, and what is refused."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
from typer.testing import Result

from gearshift.cli.options import random_placements
from gearshift.files import append_json_line
from gearshift.placement import MIXERS, Placement, PlacementSpace
from gearshift.presets import read_presets

Gearshift = Callable[..., Result]

PLACEMENTS = [Placement.parse("fa*3"), *islice(random_placements(PlacementSpace(3), 0), 30)]


def write_rows(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def rows(tmp_path: Path) -> list[Path]:
    """Tables of evaluations and of costs, in which later mixers lose more and run faster."""
    ranks = [sum(MIXERS.index(mixer) for mixer in placement) for placement in PLACEMENTS]
    evaluations = [
        {
            "checkpoint": "c",
            "data": "d",
            "placement": str(p),
            "loss": 1 + rank / 10,
            "kl": rank / 10,
            "quality": 0.3,
            "retention": 0.9,
        }
        for p, rank in zip(PLACEMENTS, ranks, strict=True)
    ]
    costs = [
        {
            "placement": str(p),
            "context_length": 512,
            "batch_size": 1,
            "seconds_per_step": 1 / (2 + rank),
            "hardware": "h",
        }
        for p, rank in zip(PLACEMENTS, ranks, strict=True)
    ]
    return [write_rows(tmp_path / "rows.jsonl", evaluations), write_rows(tmp_path / "cost.jsonl", costs)]


@pytest.fixture
def search(gearshift: Gearshift, rows: list[Path], tmp_path: Path) -> Gearshift:
    table, cost = rows
    return lambda *options: gearshift(
        "search", "--table", table, "--cost", cost, "--out", tmp_path / "out", *options
    )


def test_presets_are_written_into_the_supernet(search: Gearshift, supernet_directory: Path, tmp_path: Path):
    supernet = shutil.copytree(supernet_directory, tmp_path / "supernet")
    result = search("--supernet", supernet)
    assert result.exit_code == 0
    assert "Spearman" in result.stdout
    assert list(read_presets(supernet))[0] == "teacher"
    assert (tmp_path / "out" / "frontier.html").stat().st_size > 0


def test_without_a_supernet_the_rows_say_how_many_layers_there_are(search: Gearshift, tmp_path: Path):
    assert search().exit_code == 0
    assert json.loads((tmp_path / "out" / "frontier.json").read_text())["points"][0]["placement"] == "fa*3"


def test_without_a_supernet_no_layer_gets_a_mixer_never_seen_there(search: Gearshift, tmp_path: Path):
    """What the rows do not have, the supernet may not hold: here layer 1 has no GDN."""
    for table in (tmp_path / "rows.jsonl", tmp_path / "cost.jsonl"):
        rows = [json.loads(line) for line in table.read_text().splitlines()]
        write_rows(table, [row for row in rows if Placement.parse(row["placement"])[1] != "gated_delta_net"])
    assert search().exit_code == 0
    points = json.loads((tmp_path / "out" / "frontier.json").read_text())["points"]
    assert all(Placement.parse(point["placement"])[1] != "gated_delta_net" for point in points)
    assert any(Placement.parse(point["placement"])[0] == "gated_delta_net" for point in points)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--context", "9"], "no decode step was measured at context length 9; measured are [512]"),
        (["--target", "bits"], "no column 'bits'"),
        (["--target", "cos(kl)"], "the target 'cos(kl)'"),
        (["--supernet", "nowhere"], "nowhere is no supernet directory"),
        (
            ["--table", "nowhere.jsonl"],
            "nowhere.jsonl is missing or holds no rows; write some with gearshift evaluate",
        ),
        (
            ["--cost", "nowhere.jsonl"],
            "nowhere.jsonl is missing or holds no rows; write some with gearshift bench",
        ),
    ],
)
def test_wrong_options_are_refused(options: list[str], said: str, search: Gearshift, tmp_path: Path):
    result = search(*options)
    assert result.exit_code == 1
    assert result.stderr.startswith("error: ")
    assert said in result.stderr
    assert not (tmp_path / "out").exists()


def test_rows_that_do_not_belong_together_are_refused(search: Gearshift, rows: list[Path]):
    append_json_line(rows[0], {"checkpoint": "another", "data": "d", "placement": "gdn*3", "kl": 0.5})
    result = search()
    assert result.exit_code == 1
    assert "has the checkpoint 'another'" in result.stderr


def test_too_few_rows_are_refused(search: Gearshift, rows: list[Path]):
    rows[0].write_text("".join(rows[0].read_text().splitlines(keepends=True)[:5]))
    result = search()
    assert result.exit_code == 1
    assert "5 distinct placements were evaluated; expected at least 10" in result.stderr

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
from gearshift.files import append_json_line, read_json_lines
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
        (["--at-least", "fa"], "--at-least fa; expected mixer=layers, such as fa=4, each once"),
        (["--at-most", "gdn=1", "--at-most", "gdn=2"], "--at-most gdn=2; expected mixer=layers"),
        (["--fix", "fa=0"], "--fix fa=0; expected layer=mixer, such as 0=fa"),
        (["--fix", "7=fa"], "layer 7 is to have fa; expected a layer from 0 to 2"),
        (["--floor", "recall.copy=high"], "--floor recall.copy=high; expected column=number"),
        (["--floor", "bits=1"], "no column 'bits'"),
        (["--floor", "quality=0.9"], "every placement has the value 0.3 of quality"),
        (["--at-least", "gdn=2", "--at-least", "swa=2"], "the counts add up to 4 layers; the model has 3"),
        (["--at-least", "mamba=2"], "unknown mixer 'mamba'"),
        (["--data", "text.jsonl"], "--data asks for evaluations; say of which supernet with --supernet"),
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


def test_constraints_shape_the_frontier(search: Gearshift, tmp_path: Path):
    assert search("--at-least", "fa=1", "--fix", "2=swa", "--at-most", "gdn=0").exit_code == 0
    points = json.loads((tmp_path / "out" / "frontier.json").read_text())["points"]
    for point in points:
        placement = Placement.parse(point["placement"])
        assert "full_attention" in placement.mixers
        assert placement[2] == "sliding_attention"
        assert "gated_delta_net" not in placement.mixers
    assert len(points) > 1


def test_a_floor_has_a_surrogate_of_its_own_whose_fit_is_told(search: Gearshift, tmp_path: Path):
    result = search("--floor", "-loss=-1.35")
    assert result.exit_code == 0
    assert "floor of -loss, surrogate: 30 evaluated placements" in result.stdout
    points = json.loads((tmp_path / "out" / "frontier.json").read_text())["points"]
    ranks = [sum(map(MIXERS.index, Placement.parse(point["placement"]))) for point in points]
    assert max(ranks) == 3


def test_a_floor_that_nothing_reaches_names_the_nearest(search: Gearshift):
    result = search("--floor", "-loss=-0.5")
    assert result.exit_code == 1
    assert "no placement has -loss of at least -0.5; without" in result.stderr
    assert "such as fa*3, whose -loss is -1" in result.stderr


def test_active_search_evaluates_what_it_proposes_and_goes_on_after_a_stop(
    search: Gearshift, supernet_directory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    supernet = shutil.copytree(supernet_directory, tmp_path / "supernet")
    text = tmp_path / "held_out.py"
    text.write_text("def add(a, b):\n    return a + b\n\n\n" * 30)
    active = ("--supernet", supernet, "--data", text, "--tokens", 64, "--sequence-length", 32)
    sizes = ("--evaluations", 20, "--batch", 5, "--target", "-kl")
    active += ("--table", tmp_path / "new.jsonl")
    result = search(*active, *sizes)
    assert result.exit_code == 0, result.stderr
    assert "20 placements evaluated: all 20 evaluations are spent" in result.stdout
    rows = read_json_lines(tmp_path / "new.jsonl")
    assert len({row["placement"] for row in rows}) == len(rows) == 20
    settings, *rounds = read_json_lines(tmp_path / "out" / "rounds.jsonl")
    assert settings["evaluations"] == 20
    # Within a round they are evaluated in the order that shares most of their layers.
    assert sorted(text for made in rounds for texts in made["proposed"].values() for text in texts) == sorted(
        row["placement"] for row in rows
    )
    assert list(read_presets(supernet))[0] == "teacher"

    def nothing(*args: object, **kwargs: object) -> None:
        raise AssertionError("everything is in the table")

    monkeypatch.setattr("gearshift.evaluate.quality.load_supernet", nothing)
    again = search(*active, *sizes)
    assert again.exit_code == 0
    assert "20 placements evaluated" in again.stdout
    other = search(*active, *sizes, "--seed", 1)
    assert other.exit_code == 1
    assert "rounds.jsonl is the log of a search with" in other.stderr

"""The evaluation benchmark at a tiny size, and the gain of shared prefixes in layers that run."""

from __future__ import annotations

import json
import sys

import pytest

from gearshift.bench import evaluation
from gearshift.bench.evaluation import measure_evaluation
from gearshift.bench.shapes import SHAPES, ShapeError, named_shape
from gearshift.placement import MIXERS


def test_a_row_is_written_in_place_of_the_last_one(tmp_path, monkeypatch, capsys):
    out = tmp_path / "search.json"
    out.write_text('{"frontier_seconds": 3}')
    command = ["bench", "--out", out, "--shape", "tiny", "--placements", 6, "--windows", 4, "--tokens", 40]
    monkeypatch.setattr(sys, "argv", [*map(str, command), "--batch-size", "2", "--device", "cpu"])
    evaluation.main()
    evaluation.main()
    content = json.loads(out.read_text())
    assert content["frontier_seconds"] == 3
    (row,) = content["evaluation"]
    assert row["evaluation_floor_fraction"] == pytest.approx(row["floor_seconds"] / row["seconds"], rel=0.05)
    assert row["placements_per_hour"] == pytest.approx(3600 * 6 / row["seconds"])
    assert (row["batch_size"], row["placements"], row["bar"]) == (2, 6, 0.6)
    assert 0 < row["layers_saved"] < 1
    assert "evaluation_floor_fraction" in capsys.readouterr().out


def test_an_unknown_shape_is_refused():
    with pytest.raises(ShapeError, match="no shape '15m'; choose one of apriel-15b, 200m, tiny"):
        measure_evaluation("15m")


@pytest.mark.parametrize("name", SHAPES)
def test_shapes_hold_every_mixer_in_every_layer(name):
    space = named_shape(name).config().placement_space
    assert space.mixers == MIXERS and space.layer_mixers is None

"""Training of supernets whose layers hold different mixers."""

from __future__ import annotations

import pytest

from gearshift.files import read_json_lines
from gearshift.placement import Placement, PlacementError
from gearshift.supernet import load_supernet, save_supernet
from gearshift.train.run import train
from tests.supernet.tools import only_holding

ALL_BUT_ONE = [
    ("full_attention", "sliding_attention", "kimi_delta_attention"),
    ("full_attention",),
    ("full_attention", "gated_delta_net"),
]
NO_TEACHER = [*ALL_BUT_ONE[:2], ("gated_delta_net",)]


@pytest.fixture
def make_thin(tiny_model, supernet_directory, tmp_path):
    """A directory of the tiny supernet without some of its mixers."""
    return lambda held: save_supernet(
        only_holding(tiny_model, held), tmp_path / "thin", source=supernet_directory
    )


def test_a_run_trains_what_its_layers_hold(make_thin, make_recipe):
    supernet = make_thin(ALL_BUT_ONE)
    root = make_recipe().out
    trained = load_supernet(train(make_recipe(supernet=supernet), progress=False))
    before, after = load_supernet(supernet).state_dict(), trained.state_dict()
    moved = {
        name.split(".mixers.")[1].split(".")[0] for name in before if not (before[name] == after[name]).all()
    }
    assert moved == {"sliding_attention", "kimi_delta_attention", "gated_delta_net"}
    drawn = [text for row in read_json_lines(root / "metrics.jsonl") for text in row["placements"]]
    assert drawn
    assert all(trained.placement_space.holds(Placement.parse(text)) for text in drawn)


def test_a_supernet_without_its_teacher_is_refused(make_thin, make_recipe):
    with pytest.raises(PlacementError, match="no full_attention in layers 2: the teacher is none of"):
        train(make_recipe(supernet=make_thin(NO_TEACHER)), progress=False)
    assert not make_recipe().out.exists()

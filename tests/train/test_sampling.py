from __future__ import annotations

import random
from collections import Counter
from typing import Any

import pytest

from gearshift.placement import FULL_ATTENTION, Placement, PlacementError, PlacementSpace
from gearshift.train.recipe import SamplingPhase
from gearshift.train.sampling import Sampler, SamplingError

SPACE = PlacementSpace(12)
WAYS = ("uniform", "composition")


def sampler(
    space: PlacementSpace, *phases: Any, seed: int = 0, names=None, attention: bool = False
) -> Sampler:
    return Sampler.of(space, [SamplingPhase.model_validate(p) for p in phases], names or {}, seed, attention)


@pytest.mark.parametrize("way", WAYS)
def test_a_pure_function_of_its_arguments(way):
    drawing = sampler(SPACE, way, seed=7)
    random.seed(1)
    first = [drawing.draw(step, mb) for step in range(1, 6) for mb in range(3)]
    random.seed(2)
    assert [drawing.draw(step, mb) for step in range(1, 6) for mb in range(3)] == first


@pytest.mark.parametrize("way", WAYS)
def test_every_argument_matters(way):
    reference = sampler(SPACE, way, seed=1).draw(1, 1, 1)
    others = [sampler(SPACE, way, seed=1).draw(*where) for where in ((2, 1, 1), (1, 2, 1), (1, 1, 2))]
    others += [
        sampler(SPACE, way, seed=2).draw(1, 1, 1),
        sampler(SPACE, way, seed=1).draw(1, 1, 1, run_step=9),
    ]
    assert all(placement != reference for placement in others)


def test_known_placements_stay_what_they_were():
    """A change here would make old runs impossible to resume."""
    assert str(sampler(PlacementSpace(6), "uniform").draw(1, 0)) == "fa kda fa kda gdn*2"
    assert str(sampler(PlacementSpace(6), "composition").draw(1, 0)) == "swa gdn kda gdn kda swa"


@pytest.mark.parametrize("way", WAYS)
def test_the_teacher_is_drawn_only_where_attention_is_trained(way):
    tiny = PlacementSpace(2)
    drawn = {sampler(tiny, way).draw(step, 0) for step in range(1, 401)}
    assert len(drawn) == tiny.size - 1
    assert all(set(placement) != {FULL_ATTENTION} for placement in drawn)
    assert len({sampler(tiny, way, attention=True).draw(step, 0) for step in range(1, 401)}) == tiny.size


@pytest.mark.parametrize("way", WAYS)
def test_a_layer_gets_no_mixer_that_it_lacks(way):
    space = PlacementSpace(3, ("fa", "gdn", "kda"), (("fa",), ("fa", "gdn"), ("fa", "kda")))
    drawn = {sampler(space, way).draw(step, 0) for step in range(1, 201)}
    assert drawn == {p for p in space.all_placements() if set(p) != {FULL_ATTENTION}}


def test_uniform_gives_every_layer_every_mixer_alike():
    drawn = [sampler(SPACE, "uniform", seed=3).draw(step, 0) for step in range(1, 2001)]
    for layer in (0, 11):
        counts = Counter(placement[layer] for placement in drawn)
        assert all(420 < counts[mixer] < 580 for mixer in SPACE.mixers)


def test_composition_draws_extreme_placements_far_more_often():
    def extremes(way: str) -> int:
        drawn = (sampler(SPACE, way, seed=3).draw(step, 0) for step in range(1, 1001))
        return sum(max(placement.counts().values()) >= 10 for placement in drawn)

    assert extremes("uniform") < 5
    assert extremes("composition") > 30


def test_presets_come_with_their_probabilities_by_name_or_text():
    phase = {"presets": {"fast": 3.0, "fa*6 kda*6": 1.0}}
    drawing = sampler(SPACE, phase, names={"fast": "gdn*12"})
    counts = Counter(str(drawing.draw(step, 0)) for step in range(1, 2001))
    assert counts.keys() == {"gdn*12", "fa*6 kda*6"}
    assert 1400 < counts["gdn*12"] < 1600


def test_a_mixture_draws_each_way_as_often_as_it_weighs():
    phase = {"composition": 0.5, "uniform": 0.25, "presets": {"gdn*12": 0.25}}
    drawn = [sampler(SPACE, phase).draw(step, 0) for step in range(1, 2001)]
    preset = sum(str(placement) == "gdn*12" for placement in drawn)
    extreme = sum(max(placement.counts().values()) >= 10 for placement in drawn)
    assert 430 < preset < 600
    assert extreme - preset > 20


def test_phases_follow_one_another():
    drawing = sampler(
        SPACE, {"presets": {"gdn*12": 1}, "until": 3}, {"presets": {"kda*12": 1}, "until": 5}, "uniform"
    )
    drawn = [str(drawing.draw(step, 0, run_step=step + 100)) for step in range(1, 8)]
    assert drawn[:5] == ["gdn*12"] * 3 + ["kda*12"] * 2
    assert not {"gdn*12", "kda*12"} & set(drawn[5:])


@pytest.mark.parametrize(
    ("preset", "error", "told"),
    [
        ("gdn*11", PlacementError, "has 11 layers; expected 12"),
        ("fast", PlacementError, "fast"),
        ("fa*12", SamplingError, "is the teacher: there is nothing to train in it"),
    ],
)
def test_presets_that_do_not_fit_are_refused(preset, error, told):
    with pytest.raises(error, match=told):
        sampler(SPACE, {"presets": {preset: 1.0}})
    assert sampler(SPACE, {"presets": {"fa*12": 1.0}}, attention=True).draw(1, 0) == Placement.parse("fa*12")

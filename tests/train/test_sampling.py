from __future__ import annotations

import random
from collections import Counter

import pytest

from gearshift.placement import FULL_ATTENTION, PlacementSpace
from gearshift.train.sampling import SAMPLINGS, sample_placement

SPACE = PlacementSpace(12)


@pytest.mark.parametrize("sampling", SAMPLINGS)
def test_a_pure_function_of_its_arguments(sampling):
    random.seed(1)
    first = [sample_placement(SPACE, sampling, 7, step, mb) for step in range(5) for mb in range(3)]
    random.seed(2)
    again = [sample_placement(SPACE, sampling, 7, step, mb) for step in range(5) for mb in range(3)]
    assert first == again


@pytest.mark.parametrize("sampling", SAMPLINGS)
def test_every_argument_matters(sampling):
    reference = sample_placement(SPACE, sampling, 1, 1, 1, 1)
    others = [(2, 1, 1, 1), (1, 2, 1, 1), (1, 1, 2, 1), (1, 1, 1, 2)]
    assert all(sample_placement(SPACE, sampling, *where) != reference for where in others)


def test_known_placements_stay_what_they_were():
    """A change here would make old runs impossible to resume."""
    assert str(sample_placement(PlacementSpace(6), "uniform", 0, 1, 0)) == "fa kda fa kda gdn*2"
    assert str(sample_placement(PlacementSpace(6), "composition", 0, 1, 0)) == "swa gdn kda gdn kda swa"


@pytest.mark.parametrize("sampling", SAMPLINGS)
def test_the_teacher_is_never_drawn(sampling):
    tiny = PlacementSpace(2)
    drawn = {sample_placement(tiny, sampling, 0, step, 0) for step in range(400)}
    assert len(drawn) == tiny.size - 1
    assert all(set(placement) != {FULL_ATTENTION} for placement in drawn)


@pytest.mark.parametrize("sampling", SAMPLINGS)
def test_a_layer_gets_no_mixer_that_it_lacks(sampling):
    space = PlacementSpace(3, ("fa", "gdn", "kda"), (("fa",), ("fa", "gdn"), ("fa", "kda")))
    drawn = {sample_placement(space, sampling, 0, step, 0) for step in range(200)}
    assert drawn == {p for p in space.all_placements() if set(p) != {FULL_ATTENTION}}


def test_uniform_gives_every_layer_every_mixer_alike():
    drawn = [sample_placement(SPACE, "uniform", 3, step, 0) for step in range(2000)]
    for layer in (0, 11):
        counts = Counter(placement[layer] for placement in drawn)
        assert all(420 < counts[mixer] < 580 for mixer in SPACE.mixers)


def test_composition_draws_extreme_placements_far_more_often():
    def extremes(sampling: str) -> int:
        drawn = (sample_placement(SPACE, sampling, 3, step, 0) for step in range(1000))
        return sum(max(placement.counts().values()) >= 10 for placement in drawn)

    assert extremes("uniform") < 5
    assert extremes("composition") > 30

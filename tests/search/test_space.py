"""Additive scores, against their formula written out plainly."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gearshift.placement import MIXERS, Placement, PlacementError, PlacementSpace
from gearshift.search.space import AdditiveScore, mixer_indices, placement_of
from tests.search.brute_force import random_score


def plain_value(score: AdditiveScore, chosen: list[int]) -> float:
    total = score.constant
    for offsets, term in score.terms.items():
        for layer in range(len(term)):
            total += term[(layer, *(chosen[layer + offset] for offset in offsets))]
    return total


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 6), st.integers(1, 4), st.integers(1, 4), st.integers(1, 4), st.integers(0, 2**32 - 1))
def test_values_and_gains_follow_the_formula(layers, mixers, order, reach, seed):
    rng = np.random.default_rng(seed)
    score = random_score(rng, PlacementSpace(layers, MIXERS[:mixers]), order, reach)
    chosen = rng.integers(0, mixers, (5, layers))
    expected = [plain_value(score, row) for row in chosen.tolist()]
    assert score.values_of(chosen).tolist() == expected
    gained = [
        score.constant
        + sum(
            score.gains(layer)[tuple(row[max(0, layer - score.reach) : layer + 1])] for layer in range(layers)
        )
        for row in chosen.tolist()
    ]
    assert gained == expected


def test_score_values_of_a_worked_example():
    space = PlacementSpace(3, ("fa", "gdn"))
    layers = np.array([[1.0, 2.0], [10.0, 20.0], [100.0, 200.0]])
    near = np.array([[[0.1, 0.2], [0.3, 0.4]], [[0.01, 0.02], [0.03, 0.04]]])
    far = np.array([[[1000.0, 2000.0], [3000.0, 4000.0]]])
    score = AdditiveScore(space, 0.5, {(0,): layers, (0, 1): near, (0, 2): far})
    value = score.values([Placement.parse("gdn fa gdn")])
    assert value == pytest.approx([0.5 + 2 + 10 + 200 + 0.3 + 0.02 + 4000])
    assert score.reach == 2


def test_placements_of_another_space_are_refused():
    with pytest.raises(PlacementError, match="expected 4"):
        mixer_indices(PlacementSpace(4), [Placement.parse("fa*3")])
    with pytest.raises(PlacementError, match="holds only fa, gdn"):
        AdditiveScore(PlacementSpace(2, ("fa", "gdn")), 0.0, {}).values([Placement.parse("fa swa")])
    assert mixer_indices(PlacementSpace(4), []).shape == (0, 4)


def test_indices_and_placements_are_one_to_one():
    space = PlacementSpace(3, ("fa", "gdn", "kda"))
    for placement in space.all_placements():
        assert placement_of(space, mixer_indices(space, [placement])[0].tolist()) == placement

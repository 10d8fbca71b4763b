"""Features of placements and additive scores, against definitions written out plainly."""

from __future__ import annotations

import itertools
import random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gearshift.placement import FULL_ATTENTION, MIXERS, Placement, PlacementError, PlacementSpace
from gearshift.search.space import AdditiveScore, FeatureSpace, mixer_indices


def _draw(space: PlacementSpace, count: int, seed: int) -> list[Placement]:
    rng = random.Random(seed)
    return [space.sample_composition(rng) for _ in range(count)]


def _plain_features(placement: Placement, mixers: tuple[str, ...], reach: int) -> list[float]:
    """The definition, with loops: counts and indicators of layers, then of pairs at each distance."""
    others = [mixer for mixer in mixers if mixer != FULL_ATTENTION]
    local = [float(given == mixer) for given in placement for mixer in others]
    row = [float(list(placement).count(mixer)) for mixer in others] + local
    for distance in range(1, reach + 1):
        pairs = list(zip(placement, list(placement)[distance:], strict=False))
        kinds = list(itertools.product(others, others))
        row += [float(pairs.count(kind)) for kind in kinds]
        row += [float(pair == kind) for pair in pairs for kind in kinds]
    return row


@pytest.mark.parametrize("mixers", [MIXERS, (MIXERS[2], MIXERS[0]), MIXERS[:1]])
@pytest.mark.parametrize("reach", [0, 1, 3])
def test_features_follow_the_definition(mixers, reach):
    space = PlacementSpace(5, mixers)
    placements = _draw(space, 20, 0)
    expected = [_plain_features(placement, mixers, reach) for placement in placements]
    assert np.array_equal(FeatureSpace(space, reach).features(placements), np.array(expected).reshape(20, -1))


def test_all_full_attention_has_no_feature_set():
    assert not FeatureSpace(PlacementSpace(6), 2).features([Placement.uniform("fa", 6)]).any()


def test_groups_cover_every_column_once():
    for reach in (0, 1, 2):
        space = FeatureSpace(PlacementSpace(12), reach)
        columns = [
            column for group in space.groups for column in range(group.columns.start, group.columns.stop)
        ]
        assert columns == list(range(space.size))
    assert FeatureSpace(PlacementSpace(12), 1).size == 3 + 36 + 9 + 11 * 9


def test_the_range_is_at_most_the_longest_distance():
    assert FeatureSpace(PlacementSpace(3), 7).interaction_range == 2
    assert FeatureSpace(PlacementSpace(1), 1).size == 6


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 6), st.integers(2, 4), st.integers(0, 3), st.integers(0, 2**32 - 1))
def test_a_score_is_constant_plus_features_times_weights(layers, mixers, reach, seed):
    rng = np.random.default_rng(seed)
    features = FeatureSpace(PlacementSpace(layers, MIXERS[4 - mixers :]), reach)
    weights = rng.normal(size=features.size)
    placements = _draw(features.space, 10, seed)
    expected = 0.7 + features.features(placements) @ weights
    assert np.allclose(features.score(0.7, weights).values(placements), expected, rtol=1e-12, atol=1e-12)


def test_score_values_follow_the_formula():
    space = PlacementSpace(3, ("fa", "gdn"))
    layers = np.array([[1.0, 2.0], [10.0, 20.0], [100.0, 200.0]])
    near = np.array([[[0.1, 0.2], [0.3, 0.4]], [[0.01, 0.02], [0.03, 0.04]]])
    far = np.array([[[1000.0, 2000.0], [3000.0, 4000.0]]])
    score = AdditiveScore(space, 0.5, layers, (near, far))
    value = score.values([Placement.parse("gdn fa gdn")])
    assert value == pytest.approx([0.5 + 2 + 10 + 200 + 0.3 + 0.02 + 4000])


def test_placements_of_another_space_are_refused():
    with pytest.raises(PlacementError, match="expected 4"):
        mixer_indices(PlacementSpace(4), [Placement.parse("fa*3")])
    with pytest.raises(PlacementError, match="holds only fa, gdn"):
        FeatureSpace(PlacementSpace(2, ("fa", "gdn"))).features([Placement.parse("fa swa")])
    assert mixer_indices(PlacementSpace(4), []).shape == (0, 4)

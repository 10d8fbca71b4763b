"""Features, their kernels and the scores made of their weights, against features written out with loops."""

from __future__ import annotations

import itertools
import random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gearshift.placement import FULL_ATTENTION, MIXERS, Placement, PlacementSpace
from gearshift.search.features import FeatureGroup, FeatureSpace, total_kernel
from gearshift.search.space import Array, mixer_indices


def plain_features(placement: Placement, space: PlacementSpace, group: FeatureGroup) -> list[float]:
    """The definition: by place, or for all together, one feature a combination without the reference."""
    reference = FULL_ATTENTION if FULL_ATTENTION in space.mixers else space.mixers[0]
    others = [mixer for mixer in space.mixers if mixer != reference]
    kinds = list(itertools.product(others, repeat=group.order))
    found = [
        tuple(placement[layer + offset] for offset in group.offsets)
        for layer in range(len(placement) - group.offsets[-1])
    ]
    if group.by_layer:
        return [float(cluster == kind) for cluster in found for kind in kinds]
    return [float(found.count(kind)) for kind in kinds]


def plain_matrix(placements: list[Placement], space: PlacementSpace, group: FeatureGroup) -> Array:
    return np.array([plain_features(placement, space, group) for placement in placements]).reshape(
        len(placements), -1
    )


def draw(space: PlacementSpace, count: int, seed: int) -> list[Placement]:
    rng = random.Random(seed)
    return [space.sample_composition(rng) for _ in range(count)]


@pytest.mark.parametrize("mixers", [MIXERS, (MIXERS[2], MIXERS[0]), MIXERS[1:3], MIXERS[:1]])
@pytest.mark.parametrize(("order", "reach"), [(1, 0), (2, 1), (2, 3), (3, 2), (3, 3), (4, 3)])
def test_kernels_are_products_of_features(mixers, order, reach):
    space = PlacementSpace(5, mixers)
    features = FeatureSpace(space, order, reach)
    one, other = draw(space, 6, 0), draw(space, 9, 1)
    kernels = features.kernels(mixer_indices(space, one), mixer_indices(space, other))
    diagonals = features.diagonals(mixer_indices(space, one))
    assert list(kernels) == list(features.groups) == list(diagonals)
    for group in features.groups:
        rows = plain_matrix(one, space, group)
        assert np.array_equal(kernels[group], rows @ plain_matrix(other, space, group).T)
        assert np.array_equal(diagonals[group], np.square(rows).sum(axis=1))


def test_rows_made_in_several_parts_are_the_same(monkeypatch):
    space = PlacementSpace(5)
    features, chosen = FeatureSpace(space, 3, 2), mixer_indices(space, draw(space, 30, 0))
    whole = features.kernels(chosen, chosen)
    monkeypatch.setattr("gearshift.search.features._ROWS_AT_A_TIME", 7)
    for group, kernel in features.kernels(chosen, chosen).items():
        assert np.array_equal(kernel, whole[group])


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 6), st.integers(2, 4), st.integers(1, 3), st.integers(0, 3), st.integers(0, 2**32 - 1))
def test_a_score_is_what_the_kernels_say(layers, mixers, order, reach, seed):
    """Weights = variance * features.T @ dual, so that scores of others are their kernels @ dual."""
    rng = np.random.default_rng(seed)
    space = PlacementSpace(layers, MIXERS[4 - mixers :])
    features = FeatureSpace(space, order, reach)
    known, others = (mixer_indices(space, draw(space, 8, seed + step)) for step in range(2))
    variances = {group: float(rng.random()) for group in features.groups}
    dual = rng.normal(size=8)
    score = features.score(0.7, variances, known, dual)
    expected = 0.7 + total_kernel(features.kernels(others, known), variances) @ dual
    assert np.allclose(score.values_of(others), expected, rtol=1e-12, atol=1e-12)
    assert score.values([space.mostly("fa") if "full_attention" in space.mixers else space.default]) == (
        pytest.approx([0.7])
    )


def test_drawn_weights_have_the_variances_of_their_groups():
    space = PlacementSpace(6)
    features = FeatureSpace(space, 2, 1)
    variances = {group: 0.5 + number for number, group in enumerate(features.groups)}
    rng = np.random.default_rng(0)
    chosen = mixer_indices(space, draw(space, 5, 3))
    drawn = np.array(
        [
            features.score_of_weights(0.0, features.draw_weights(variances, rng)).values_of(chosen)
            for _ in range(4000)
        ]
    )
    expected = total_kernel(features.kernels(chosen, chosen), variances)
    assert np.cov(drawn.T) == pytest.approx(expected, rel=0.15, abs=0.1 * expected.max())


def test_order_and_range_keep_to_what_the_model_has():
    assert FeatureSpace(PlacementSpace(3), 2, 7).interaction_range == 2
    small = FeatureSpace(PlacementSpace(1), 3, 3)
    assert (small.order, small.interaction_range) == (1, 0)
    assert FeatureSpace(PlacementSpace(9), 1, 3).interaction_range == 0
    names = [group.name for group in FeatureSpace(PlacementSpace(9), 3, 2).groups]
    assert names == [
        *("0 by kind", "0 by layer", "0-1 by kind", "0-1 by layer", "0-2 by kind", "0-2 by layer"),
        *("0-1-2 by kind", "0-1-2 by layer"),
    ]

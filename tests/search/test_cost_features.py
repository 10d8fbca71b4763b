"""Features against the formulas, layer by layer; and the regression against ordinary least squares."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gearshift.search.cost_engine import Engine, MixerMemory
from gearshift.search.cost_features import DECODE_SHARED, PER_MIXER, PROMPT_SHARED, CostFeatures
from gearshift.search.cost_regression import PositiveFit

FULL, WINDOW = MixerMemory("full", 4, 8), MixerMemory("window", 4, 8, 6)
# The first layer's own attention has a window, too.
LAYERS = (
    {"full_attention": MixerMemory("window", 4, 8, 10), "gated_delta_net": MixerMemory("state", 9, 8)},
    {"full_attention": FULL, "sliding_attention": WINDOW},
    {"full_attention": FULL, "gated_delta_net": MixerMemory("state", 9, 8), "sliding_attention": WINDOW},
)
ENGINE = Engine("made up", 100, LAYERS)
WEIGHTS = np.linspace(1, 2, DECODE_SHARED + 3 * PER_MIXER)


@given(st.integers(0, 11), st.integers(1, 40), st.integers(1, 9))
def test_a_steps_features_are_the_formula(index, context, batch):
    placement = list(ENGINE.space.all_placements())[index]
    features = CostFeatures(ENGINE.space, ENGINE, knee=5).decode([placement], context, [batch])
    fixed, sequence, crowd = WEIGHTS[:DECODE_SHARED]
    expected = fixed + batch * sequence + max(batch - 5, 0) * crowd
    for layer, mixer in zip(LAYERS, placement, strict=True):
        weights, state, token = WEIGHTS[DECODE_SHARED:].reshape(3, 3)[ENGINE.space.mixers.index(mixer)]
        expected += weights + batch * (state + layer[mixer].tokens_read(context) * token)
    assert (features @ WEIGHTS)[0] == pytest.approx(expected)


@given(st.integers(0, 11), st.integers(1, 40))
def test_a_prompts_features_are_the_formula(index, tokens):
    placement = list(ENGINE.space.all_placements())[index]
    features = CostFeatures(ENGINE.space, ENGINE).prompt([placement], tokens)
    expected = WEIGHTS[0] + tokens * WEIGHTS[1]
    for layer, mixer in zip(LAYERS, placement, strict=True):
        weights, state, pair = WEIGHTS[PROMPT_SHARED:-1].reshape(3, 3)[ENGINE.space.mixers.index(mixer)]
        expected += weights + tokens * state + layer[mixer].pairs_read(tokens) * pair
    assert (features @ WEIGHTS[:-1])[0] == pytest.approx(expected)


def test_where_no_weight_would_be_negative_the_fit_is_least_squares():
    rng = np.random.default_rng(0)
    features = rng.random((60, 4))
    seconds = features @ [1.0, 2.0, 3.0, 4.0] * np.exp(0.05 * rng.normal(size=60))
    expected = np.linalg.lstsq(features / seconds[:, None], np.ones(60), rcond=None)[0]
    fit = PositiveFit(features, seconds)
    assert fit.weights == pytest.approx(expected)
    assert fit.freedom == 56


def test_draws_spread_as_fits_to_new_measurements_do():
    """Against fits to truly new noise, which only a made-up truth can give."""
    rng = np.random.default_rng(0)
    features, truth = rng.random((40, 3)) + 0.2, np.array([1.0, 2.0, 3.0])

    def seconds() -> np.ndarray:
        return features @ truth * (1 + 0.05 * rng.normal(size=40))

    again = np.stack([PositiveFit(features, seconds()).weights for _ in range(300)])
    spread = np.mean([PositiveFit(features, seconds()).draws.std(axis=0) for _ in range(5)], axis=0)
    assert spread == pytest.approx(again.std(axis=0), rel=0.3)


def test_only_combinations_of_what_was_measured_are_settled():
    features = np.array([[1.0, 2.0, 0.0], [1.0, 4.0, 0.0], [1.0, 6.0, 0.0]])
    fit = PositiveFit(features, np.ones(3))
    assert fit.settles(np.array([[1.0, 1e6, 0.0], [0.0, 5.0, 0.0]]))
    assert not fit.settles(np.array([[1.0, 2.0, 1e-3]]))
    flat = PositiveFit(np.array([[1.0, 2.0, 0.0]] * 3), np.ones(3))
    assert flat.settles(np.array([[2.0, 4.0, 0.0]]))
    assert not flat.settles(np.array([[1.0, 3.0, 0.0]]))

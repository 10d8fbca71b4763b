"""The regression against closed forms and scikit-learn's own predictions."""

from __future__ import annotations

import numpy as np
import pytest
from sklearn.linear_model import BayesianRidge

from gearshift.search.regression import Hyperparameters, Posterior, choose_hyperparameters, fit_posterior
from gearshift.search.space import FeatureSpace

SCALES = {"mixer": 1.0, "layer": 0.3, "mixer pair": 0.5, "layer pair": 0.1}


@pytest.fixture
def problem(made_up):
    space = FeatureSpace(made_up.space, 1)
    placements = made_up.draw(40)
    values = made_up.truth.values(placements) + 0.01 * np.random.default_rng(0).normal(size=40)
    return space, space.features(placements), values


def _scale_columns(space: FeatureSpace) -> np.ndarray:
    columns = np.zeros(space.size)
    for group in space.groups:
        columns[group.columns] = SCALES[group.name]
    return columns


def test_posterior_is_ridge_in_the_dual_form(problem):
    """Weights by the n x n system of Gaussian-process regression, which shares no step with the code."""
    space, features, values = problem
    chosen = Hyperparameters(1, SCALES, noise_precision=400.0, weight_precision=30.0)
    posterior = fit_posterior(features, values, space, chosen)
    prior = _scale_columns(space) ** 2 / 30.0
    away = features - features.mean(axis=0)
    kernel = (away * prior) @ away.T + np.eye(len(values)) / 400.0
    weights = prior * (away.T @ np.linalg.solve(kernel, values - values.mean()))
    assert posterior.weights == pytest.approx(weights, abs=1e-9)
    covariance = np.diag(prior) - (prior[:, None] * away.T) @ np.linalg.solve(kernel, away * prior)
    assert posterior.factor.T @ posterior.factor == pytest.approx(covariance, abs=1e-9)
    assert posterior.intercept == pytest.approx(values.mean() - features.mean(axis=0) @ weights)


def test_predictions_equal_those_of_bayesian_ridge(problem):
    space, features, values = problem
    columns = _scale_columns(space)
    model = BayesianRidge(max_iter=1000, tol=1e-9).fit(features * columns, values)
    chosen = Hyperparameters(1, SCALES, float(model.alpha_), float(model.lambda_))
    mean, std = fit_posterior(features, values, space, chosen).predict(features[:7])
    expected_mean, expected_std = model.predict(features[:7] * columns, return_std=True)
    assert mean == pytest.approx(expected_mean, abs=1e-5)
    # Ours also counts that the mean of the values is uncertain: noise variance / rows.
    assert np.square(std) - 1 / model.alpha_ / 40 == pytest.approx(np.square(expected_std), rel=1e-3)


def test_uncertainty_is_least_at_the_centre():
    posterior = Posterior(np.array([1.0, 2.0]), 5.0, np.array([0.5, 0.0]), np.eye(2), 0.04, 4)
    mean, std = posterior.predict(np.array([[1.0, 2.0], [3.0, 2.0]]))
    assert mean.tolist() == [5.0, 6.0]
    assert std == pytest.approx([np.sqrt(0.05), np.sqrt(4.05)])
    assert posterior.intercept == 4.5


def _chosen(made_up, placements, values) -> Hyperparameters:
    return choose_hyperparameters(
        placements, values, [FeatureSpace(made_up.space, reach) for reach in (0, 1)]
    )


def test_evidence_sees_interactions_where_there_are_some_and_only_there(made_up):
    placements = made_up.draw(120)
    rng = np.random.default_rng(0)
    with_pairs = made_up.truth.values(placements) + 0.005 * rng.normal(size=120)
    single = FeatureSpace(made_up.space, 0).features(placements)
    without = single @ rng.normal(size=single.shape[1]) + 0.5 * rng.normal(size=120)
    assert _chosen(made_up, placements, with_pairs).interaction_range == 1
    assert _chosen(made_up, placements, without).interaction_range == 0


def test_choice_follows_the_unit_of_the_values(made_up):
    placements = made_up.draw(60)
    values = made_up.truth.values(placements)
    small, large = (_chosen(made_up, placements, unit * values) for unit in (1e-3, 1e3))
    assert small.scales == large.scales
    assert small.noise_precision == pytest.approx(large.noise_precision * 1e12, rel=1e-3)
    assert small.weight_precision == pytest.approx(large.weight_precision * 1e12, rel=1e-3)

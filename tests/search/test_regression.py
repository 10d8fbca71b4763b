"""The regression against closed forms in the other, primal, form and against scikit-learn."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from scipy.stats import multivariate_normal
from sklearn.linear_model import BayesianRidge

from gearshift.search.features import FeatureSpace
from gearshift.search.regression import Hyperparameters, Posterior, _Evidence, choose, fit_posterior, tune
from gearshift.search.space import mixer_indices
from tests.search.test_features import plain_matrix

NOISE = 0.0025


@pytest.fixture(scope="module")
def problem(made_up):
    features = FeatureSpace(made_up.space, 3, 2)
    placements = made_up.draw(40)
    values = made_up.truth.values(placements) + 0.01 * np.random.default_rng(0).normal(size=40)
    return features, placements, values


def hyperparameters(features: FeatureSpace) -> Hyperparameters:
    variances = {group.name: 0.03 / (1 + number) for number, group in enumerate(features.groups)}
    return Hyperparameters(features.order, features.interaction_range, variances, NOISE, 100.0)


def fitted(features, placements, values) -> Posterior:
    chosen = mixer_indices(features.space, placements)
    kernels = features.kernels(chosen, chosen)
    return fit_posterior(features, kernels, chosen, values, hyperparameters(features))


def scaled_features(features, placements) -> np.ndarray:
    """All features times their prior standard deviations, and a column for the intercept."""
    chosen = hyperparameters(features)
    columns = [
        np.sqrt(chosen.variances[group.name]) * plain_matrix(placements, features.space, group)
        for group in features.groups
    ]
    return np.concatenate([*columns, np.full((len(placements), 1), 10.0)], axis=1)


def test_predictions_are_those_of_the_primal_form(problem, made_up):
    """Bishop, Pattern Recognition and Machine Learning, eq. 3.53, 3.54, 3.59, with features written out."""
    features, placements, values = problem
    unseen = made_up.draw(60)[40:]
    known, new = scaled_features(features, placements), scaled_features(features, unseen)
    covariance = np.linalg.inv(np.eye(known.shape[1]) + known.T @ known / NOISE)
    weights = covariance @ known.T @ (values - values.mean()) / NOISE
    mean, std = fitted(*problem).predict(mixer_indices(features.space, unseen))
    assert mean == pytest.approx(values.mean() + new @ weights, abs=1e-6)
    assert np.square(std) == pytest.approx(NOISE + ((new @ covariance) * new).sum(axis=1), rel=1e-4)


def test_predictions_equal_those_of_bayesian_ridge(problem):
    features, placements, values = problem
    matrix = scaled_features(features, placements)[:, :-1]
    model = BayesianRidge(max_iter=1, fit_intercept=True, alpha_init=1 / NOISE, lambda_init=1.0)
    model.alpha_, model.lambda_ = 1 / NOISE, 1.0
    centred = matrix - matrix.mean(axis=0)
    weights = np.linalg.solve(
        centred.T @ centred / NOISE + np.eye(matrix.shape[1]), centred.T @ values / NOISE
    )
    model.coef_, model.intercept_ = weights, values.mean() - matrix.mean(axis=0) @ weights
    mean, _ = fitted(*problem).predict(mixer_indices(features.space, placements[:7]))
    assert mean == pytest.approx(model.predict(matrix[:7]), abs=1e-4)


def evidence_of(problem) -> _Evidence:
    features, placements, values = problem
    chosen = mixer_indices(features.space, placements)
    return _Evidence(features, features.kernels(chosen, chosen), values)


def test_the_evidence_is_the_density_of_the_values(problem):
    evidence = evidence_of(problem)
    logarithms = evidence.centre + 0.3
    *shares, noise = np.exp(logarithms)
    covariance = sum(share * kernel for share, kernel in zip(shares, evidence.kernels, strict=True))
    covariance = covariance + 100.0 + noise * np.eye(len(evidence.values))
    expected = multivariate_normal(np.zeros(len(covariance)), covariance).logpdf(evidence.values)
    prior, _ = evidence._prior(logarithms)
    assert -evidence.loss(logarithms)[0] - prior == pytest.approx(expected)


def test_laplaces_evidence_is_near_the_integral(made_up):
    """Over the two scales and the noise of a space without interactions, on a grid."""
    features, placements = FeatureSpace(made_up.space), made_up.draw(60)
    values = made_up.truth.values(placements) + 0.02 * np.random.default_rng(0).normal(size=60)
    evidence = evidence_of((features, placements, values))
    optimum = evidence.optimum(None, 100)
    axes = [np.linspace(-4, 4, 17)] * 2 + [np.linspace(-1.5, 1.5, 17)]
    points = [optimum + np.array(away) for away in itertools.product(*axes)]
    density = np.array([np.exp(-evidence.loss(point)[0]) for point in points])
    volume = float(np.prod([axis[1] - axis[0] for axis in axes]))
    expected = np.log(density.sum() * volume) - 1.5 * np.log(2 * np.pi * 2.0**2)
    assert evidence.log_evidence(optimum) == pytest.approx(expected, abs=0.5)


def test_the_gradient_of_the_evidence_is_its_difference_quotient(problem):
    evidence = evidence_of(problem)
    at = evidence.centre + np.random.default_rng(1).normal(size=len(evidence.centre))
    _, gradient = evidence.loss(at)
    for number, step in enumerate(1e-5 * np.eye(len(at))):
        quotient = (evidence.loss(at + step)[0] - evidence.loss(at - step)[0]) / 2e-5
        assert gradient[number] == pytest.approx(quotient, rel=1e-4, abs=1e-5)


def test_draws_have_the_posteriors_mean_and_covariance(problem, made_up):
    features, placements, values = problem
    posterior = fitted(*problem)
    unseen = mixer_indices(features.space, made_up.draw(46)[40:])
    rng = np.random.default_rng(0)
    drawn = np.array([posterior.sample(rng).values_of(unseen) for _ in range(3000)])
    mean, std = posterior.predict(unseen)
    variance = np.square(std) - NOISE
    assert drawn.mean(axis=0) == pytest.approx(mean, abs=4 * np.sqrt(variance.max() / 3000))
    assert drawn.var(axis=0) == pytest.approx(variance, rel=0.2)


def chosen_for(made_up, placements, values) -> Hyperparameters:
    candidates = [FeatureSpace(made_up.space, *size) for size in ((1, 0), (2, 1), (3, 3))]
    chosen = mixer_indices(made_up.space, placements)
    return choose(candidates, candidates[-1].kernels(chosen, chosen), values)


def test_evidence_sees_interactions_where_there_are_some_and_only_there(made_up):
    placements = made_up.draw(120)
    rng = np.random.default_rng(0)
    with_pairs = made_up.truth.values(placements) + 0.005 * rng.normal(size=120)
    single = type(made_up.truth)(made_up.space, 0.0, {(0,): rng.normal(size=(12, 4))}).values(placements)
    found = chosen_for(made_up, placements, with_pairs)
    assert (found.order, found.interaction_range) == (2, 1)
    assert chosen_for(made_up, placements, single + 0.5 * rng.normal(size=120)).order == 1


def test_choice_follows_the_unit_of_the_values(made_up):
    placements = made_up.draw(60)
    values = made_up.truth.values(placements)
    small, large = (chosen_for(made_up, placements, unit * values) for unit in (1e-3, 1e3))
    assert small.order == large.order
    assert large.noise_variance == pytest.approx(small.noise_variance * 1e12, rel=1e-2)
    for name, variance in small.variances.items():
        assert large.variances[name] == pytest.approx(variance * 1e12, rel=1e-2)


def test_tuning_looks_at_the_same_few_of_many_rows(made_up):
    placements = made_up.draw(80)
    values = made_up.truth.values(placements)
    features, chosen = FeatureSpace(made_up.space), mixer_indices(made_up.space, placements)
    kernels = features.kernels(chosen, chosen)
    first, second = (tune(features, kernels, values, most_rows=40) for _ in range(2))
    assert first == second
    assert first != tune(features, kernels, values)

"""Bayesian linear regression in its dual form, with one prior scale for each group of features.

With n placements everything is done with n x n kernels (Rasmussen and Williams, Gaussian Processes for
Machine Learning, 2006: eq. 2.25 and 2.26 for predictions, 5.8 and 5.9 for the evidence and its gradient). A
prior scale that the data do not ask for goes to zero, and its features with it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from scipy.linalg import cho_solve, cholesky, solve_triangular
from scipy.optimize import minimize

from gearshift.search.features import FeatureGroup, FeatureSpace, Indices, total_kernel, weighted_sum
from gearshift.search.space import AdditiveScore, Array

Kernels = Mapping[FeatureGroup, Array]

# Prior variance of the intercept, in units of the values' variance: it may be anything.
_INTERCEPT = 100.0
# Prior of a group's share of the values' variance: log-normal about this for clusters of one, two, three ...
# layers.
_SHARES = (0.3, 0.03, 0.01)
_SHARE_SPREAD = 2.0  # standard deviation of the logarithm
# Prior of the noise precision, for values of variance 1: as if two observations had shown that what the
# features leave out is 5% of the spread. With more features than rows the evidence could otherwise take it
# for nothing.
_NOISE_SHAPE, _NOISE_RATE = 1.0, 0.05**2
_BOUNDS = (-16.0, 4.0)  # of the logarithms, on the values' scale
_CURVATURE_STEP = 0.05
# The evidence of n rows takes n^3 operations. Rows by which feature spaces are compared, and by which the one
# that is chosen gets its last touch: the noise of 400 rows is a tenth off that of 1,000.
COMPARED_ROWS = 400
_TUNED_ROWS, _LAST_STEPS = 1200, 10


@dataclass(frozen=True)
class Hyperparameters:
    """What the evidence settles before the weights are known.

    Attributes:
        order: the most layers that interact with one another.
        interaction_range: how far apart they may be.
        variances: prior variance of a weight, by name of its feature group.
        noise_variance: variance of what the features do not explain.
        intercept_variance: prior variance of the value at all-FA about the mean of the values.
    """

    order: int
    interaction_range: int
    variances: dict[str, float]
    noise_variance: float
    intercept_variance: float

    def by_group(self, features: FeatureSpace) -> dict[FeatureGroup, float]:
        """The variances by feature group.

        Raises:
            KeyError: a group has none.
        """
        return {group: self.variances[group.name] for group in features.groups}


def tune(
    features: FeatureSpace,
    kernels: Kernels,
    values: Array,
    start: Hyperparameters | None = None,
    steps: int = 100,
    most_rows: int = COMPARED_ROWS,
) -> Hyperparameters:
    """The most probable prior scales and noise.

    Args:
        features: the feature space; its groups are tuned.
        kernels: by group (n, n); further groups may be there.
        values: (n,), not all equal.
        start: where to start; None starts at the prior's centre.
        steps: of the optimiser, at most.
        most_rows: rows to look at; of more rows, some are drawn, always the same ones.
    """
    problem = _problem(features, kernels, values, most_rows)
    return problem.to_hyperparameters(problem.optimum(start, steps))


def choose(candidates: Sequence[FeatureSpace], kernels: Kernels, values: Array) -> Hyperparameters:
    """The scales and the noise of the feature space of the largest evidence.

    Args:
        candidates: feature spaces to choose from.
        kernels: by group (n, n), of every candidate's groups.
        values: (n,), not all equal.
    """
    best: tuple[float, FeatureSpace, Hyperparameters] | None = None
    for features in candidates:
        problem = _problem(features, kernels, values, COMPARED_ROWS)
        optimum = problem.optimum(None, 100)
        evidence = problem.log_evidence(optimum) if len(candidates) > 1 else 0.0
        if best is None or evidence > best[0]:
            best = evidence, features, problem.to_hyperparameters(optimum)
    assert best is not None
    _, features, chosen = best
    if len(values) <= COMPARED_ROWS:
        return chosen
    return tune(features, kernels, values, chosen, _LAST_STEPS, _TUNED_ROWS)


def _problem(features: FeatureSpace, kernels: Kernels, values: Array, most_rows: int) -> _Evidence:
    rows = _some_rows(len(values), most_rows)
    return _Evidence(
        features, {group: kernels[group][np.ix_(rows, rows)] for group in features.groups}, values[rows]
    )


def _some_rows(count: int, most: int) -> Indices:
    if count <= most:
        return np.arange(count)
    return np.sort(np.random.default_rng(0).choice(count, most, replace=False))


class _Evidence:
    """The evidence as a function of the logarithms of each group's share of the variance and the noise's."""

    def __init__(self, features: FeatureSpace, kernels: Kernels, values: Array) -> None:
        self.features = features
        # The priors are not free of units, so they see values of variance 1 and features of spread 1.
        self.unit = float(values.std()) or 1.0
        self.values = (values - values.mean()) / self.unit
        self.spreads = [_spread(kernels[group]) for group in features.groups]
        self.kernels = [
            kernels[group] / spread for group, spread in zip(features.groups, self.spreads, strict=True)
        ]
        shares = [_SHARES[min(group.order, len(_SHARES)) - 1] for group in features.groups]
        self.centre = np.log([*shares, 0.05])

    def to_hyperparameters(self, logarithms: Array) -> Hyperparameters:
        *shares, noise = np.exp(logarithms).tolist()
        variances = {
            group.name: share / spread * self.unit**2
            for group, share, spread in zip(self.features.groups, shares, self.spreads, strict=True)
        }
        return Hyperparameters(
            self.features.order,
            self.features.interaction_range,
            variances,
            noise * self.unit**2,
            _INTERCEPT * self.unit**2,
        )

    def to_logarithms(self, chosen: Hyperparameters) -> Array:
        variances = chosen.by_group(self.features)
        shares = [
            variances[group] * spread
            for group, spread in zip(self.features.groups, self.spreads, strict=True)
        ]
        return np.log(np.array([*shares, chosen.noise_variance]) / self.unit**2)

    def optimum(self, start: Hyperparameters | None, steps: int) -> Array:
        """The most probable logarithms, from the prior's centre or another start."""
        begin = self.centre if start is None else self.to_logarithms(start)
        found = minimize(
            self.loss,
            np.clip(begin, *_BOUNDS),
            jac=True,
            method="L-BFGS-B",
            bounds=[_BOUNDS] * len(begin),
            options={"maxiter": steps, "ftol": 1e-6},
        )
        return found.x

    def log_evidence(self, optimum: Array) -> float:
        """Log of the values' probability with all scales and the noise integrated out, by Laplace's method.

        A scale that the values say nothing of costs nothing; one that they settle costs what its prior
        allowed besides (MacKay, Bayesian Interpolation, 1992, eq. 4.5). Curvatures are differences of the
        gradient.
        """
        steps = _CURVATURE_STEP * np.eye(len(optimum))
        rows = [
            (self.loss(optimum + step)[1] - self.loss(optimum - step)[1]) / (2 * _CURVATURE_STEP)
            for step in steps
        ]
        curvature = np.linalg.eigvalsh((np.array(rows) + np.array(rows).T) / 2)
        # No direction is flatter than the prior of a scale; where bounds hold one back, it may seem so.
        flattest = 1 / _SHARE_SPREAD**2
        volume = -0.5 * np.log(np.maximum(curvature, flattest) / flattest).sum()
        return float(-self.loss(optimum)[0] + volume)

    def loss(self, logarithms: Array) -> tuple[float, Array]:
        """Minus the log posterior of the logarithms, and its gradient."""
        lower, dual = self._solve(logarithms)
        inverse = cho_solve((lower, True), np.eye(len(dual)), check_finite=False)
        # d log p / d log v_g = v_g / 2 (dual' K_g dual - trace(K^-1 K_g)); both terms are sums over one
        # matrix.
        pull = np.outer(dual, dual) - inverse
        slopes = [np.vdot(pull, kernel) for kernel in self.kernels] + [np.trace(pull)]
        gradient = 0.5 * np.exp(logarithms) * np.array(slopes)
        prior, prior_gradient = self._prior(logarithms)
        return -self._log_probability(lower, dual) - prior, -gradient - prior_gradient

    def _solve(self, logarithms: Array) -> tuple[Array, Array]:
        """The Cholesky factor of the values' covariance K, and K^-1 values."""
        *shares, noise = np.exp(logarithms)
        covariance = weighted_sum(zip(self.kernels, shares, strict=True)) + _INTERCEPT
        covariance[np.diag_indices_from(covariance)] += noise
        lower = cholesky(covariance, lower=True, overwrite_a=True, check_finite=False)
        return lower, cho_solve((lower, True), self.values, check_finite=False)

    def _log_probability(self, lower: Array, dual: Array) -> float:
        determinant = np.log(np.diag(lower)).sum()
        return float(-0.5 * self.values @ dual - determinant - 0.5 * len(dual) * np.log(2 * np.pi))

    def _prior(self, logarithms: Array) -> tuple[float, Array]:
        away = (logarithms[:-1] - self.centre[:-1]) / _SHARE_SPREAD
        precision = np.exp(-logarithms[-1])
        value = -0.5 * away @ away - _NOISE_SHAPE * logarithms[-1] - _NOISE_RATE * precision
        return float(value), np.append(-away / _SHARE_SPREAD, _NOISE_RATE * precision - _NOISE_SHAPE)


def _spread(kernel: Array) -> float:
    """A value's variance when the weights of features have variance 1; 1 where the features never differ."""
    spread = float(np.trace(kernel) / len(kernel) - kernel.mean())
    return spread if spread > 1e-12 else 1.0


@dataclass(frozen=True, eq=False)
class Posterior:
    """Posterior of the linear model: value = intercept + features @ weights + noise.

    Attributes:
        features: the features.
        chosen: the fitted placements (n, layers), as indices of mixers.
        centre: mean of the values.
        dual: (n,) covariance^-1 @ (values - centre).
        lower: (n, n) Cholesky factor of the covariance of the values.
        hyperparameters: what it was fitted with.
        values: (n,).
    """

    features: FeatureSpace
    chosen: Indices
    centre: float
    dual: Array
    lower: Array
    hyperparameters: Hyperparameters
    values: Array

    @cached_property
    def score(self) -> AdditiveScore:
        """The predicted mean, as sums over clusters of layers."""
        intercept = self.centre + self.hyperparameters.intercept_variance * float(self.dual.sum())
        return self.features.score(intercept, self._variances, self.chosen, self.dual)

    @cached_property
    def _variances(self) -> dict[FeatureGroup, float]:
        return self.hyperparameters.by_group(self.features)

    def predict(self, placements: Indices) -> tuple[Array, Array]:
        """Mean and standard deviation (m,) of a new observation at placements (m, layers)."""
        chosen = self.hyperparameters
        cross = total_kernel(self.features.kernels(self.chosen, placements), self._variances)
        own = self.features.diagonals(placements)
        prior = weighted_sum((own[group], variance) for group, variance in self._variances.items())
        known = solve_triangular(
            self.lower, cross + chosen.intercept_variance, lower=True, check_finite=False
        )
        variance = prior + chosen.intercept_variance - np.square(known).sum(axis=0)
        return self.score.values_of(placements), np.sqrt(np.maximum(variance, 0.0) + chosen.noise_variance)

    def sample(self, rng: np.random.Generator) -> AdditiveScore:
        """A draw of the whole score from the posterior.

        By Matheron's rule: a draw from the prior, corrected by what the fitted placements say of it (Wilson
        et al., Pathwise Conditioning of Gaussian Processes, 2021, eq. 9).
        """
        chosen = self.hyperparameters
        intercept = float(rng.normal() * np.sqrt(chosen.intercept_variance))
        weights = self.features.draw_weights(self._variances, rng)
        prior = self.features.score_of_weights(intercept, weights)
        noise = np.sqrt(chosen.noise_variance) * rng.normal(size=len(self.values))
        surprise = self.values - self.centre - prior.values_of(self.chosen) - noise
        dual = cho_solve((self.lower, True), surprise, check_finite=False)
        constant = self.centre + intercept + chosen.intercept_variance * float(dual.sum())
        update = self.features.score(constant, self._variances, self.chosen, dual)
        terms = {offsets: term + prior.terms[offsets] for offsets, term in update.terms.items()}
        return AdditiveScore(self.features.space, constant, terms)


def fit_posterior(
    features: FeatureSpace, kernels: Kernels, chosen: Indices, values: Array, hyperparameters: Hyperparameters
) -> Posterior:
    """The posterior in closed form.

    Args:
        features: the features.
        kernels: by group (n, n), of ``chosen`` with itself.
        chosen: placements (n, layers), as indices of mixers.
        values: (n,).
        hyperparameters: prior scales and noise.
    """
    covariance = (
        total_kernel(kernels, hyperparameters.by_group(features)) + hyperparameters.intercept_variance
    )
    covariance[np.diag_indices_from(covariance)] += hyperparameters.noise_variance
    lower = cholesky(covariance, lower=True, overwrite_a=True, check_finite=False)
    centre = float(values.mean())
    dual = cho_solve((lower, True), values - centre, check_finite=False)
    return Posterior(features, chosen, centre, dual, lower, hyperparameters, values)

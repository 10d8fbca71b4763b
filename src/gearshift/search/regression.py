"""Bayesian linear regression whose prior scales are chosen by the evidence."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from sklearn.linear_model import BayesianRidge

from gearshift.placement import Placement
from gearshift.search.space import Array, FeatureGroup, FeatureSpace

# Prior standard deviation of a weight in each group of features, relative to the group "mixer": candidates.
_SCALES = {
    "mixer": (1.0,),
    "layer": (0.1, 0.3, 1.0),
    "mixer pair": (0.1, 0.5),
    "layer pair": (0.03, 0.1, 0.3),
}

# Prior of the noise precision, for values of variance 1: as if two observations had shown that what the
# features leave out is 5% of the spread. With more features than rows the evidence could otherwise take it
# for nothing.
_NOISE_SHAPE, _NOISE_RATE = 1.0, 0.05**2


@dataclass(frozen=True)
class Hyperparameters:
    """What the evidence settles before the weights are known.

    Attributes:
        interaction_range: pairs of layers up to this distance interact.
        scales: prior standard deviation by name of feature group, relative to one another.
        noise_precision: 1 / variance of what the features do not explain.
        weight_precision: 1 / prior variance of a weight of scale 1.
    """

    interaction_range: int
    scales: dict[str, float]
    noise_precision: float
    weight_precision: float


@dataclass(frozen=True, eq=False)
class Posterior:
    """Posterior of the linear model y = intercept + x @ weights + noise.

    Attributes:
        centre: (features,) mean of the training features, where the intercept's and weights' errors are
            independent.
        mean: value at the centre.
        weights: (features,).
        factor: (features, features); factor.T @ factor is the covariance of the weights.
        noise_variance: variance of one observation about the line.
        rows: number of training rows.
    """

    centre: Array
    mean: float
    weights: Array
    factor: Array
    noise_variance: float
    rows: int

    @property
    def intercept(self) -> float:
        """Value where all features are zero."""
        return self.mean - float(self.centre @ self.weights)

    def predict(self, features: Array) -> tuple[Array, Array]:
        """Mean and standard deviation (n,) of a new observation at features (n, features)."""
        away = features - self.centre
        spread = np.square(away @ self.factor.T).sum(axis=1)
        variance = spread + self.noise_variance * (1 + 1 / self.rows)
        return self.mean + away @ self.weights, np.sqrt(variance)


def fit_posterior(features: Array, values: Array, space: FeatureSpace, chosen: Hyperparameters) -> Posterior:
    """The posterior in closed form (Bishop, Pattern Recognition and Machine Learning, eq. 3.53 and 3.54).

    Args:
        features: (n, size).
        values: (n,).
        space: tells which features share a scale.
        chosen: precisions and scales.
    """
    scales = _column_scales(space.groups, space.size, chosen.scales)
    centre = features.mean(axis=0)
    scaled = (features - centre) * scales
    mean = float(values.mean())
    precision = chosen.weight_precision * np.eye(space.size) + chosen.noise_precision * scaled.T @ scaled
    lower = np.linalg.cholesky(precision)
    factor = np.linalg.solve(lower, np.diag(scales))
    weights = chosen.noise_precision * factor.T @ (factor @ ((features - centre).T @ (values - mean)))
    return Posterior(centre, mean, weights, factor, 1 / chosen.noise_precision, len(values))


def choose_hyperparameters(
    placements: Sequence[Placement], values: Array, candidates: Sequence[FeatureSpace]
) -> Hyperparameters:
    """Interaction range, prior scales and precisions of the largest evidence.

    Args:
        placements: n of them.
        values: (n,), not all equal.
        candidates: feature spaces to choose from.
    """
    # The hyperpriors of BayesianRidge are not free of units, so it sees values of variance 1.
    unit = float(values.std())
    best: tuple[float, Hyperparameters] | None = None
    for space in candidates:
        features = space.features(placements)
        features = features - features.mean(axis=0)
        for scales in _scale_choices(space.groups):
            model = BayesianRidge(
                compute_score=True, max_iter=1000, tol=1e-5, alpha_1=_NOISE_SHAPE, alpha_2=_NOISE_RATE
            )
            model.fit(features * _column_scales(space.groups, space.size, scales), values / unit)
            evidence = float(model.scores_[-1])
            if best is None or evidence > best[0]:
                noise, weight = float(model.alpha_) / unit**2, float(model.lambda_) / unit**2
                best = evidence, Hyperparameters(space.interaction_range, scales, noise, weight)
    assert best is not None
    return best[1]


def _scale_choices(groups: Sequence[FeatureGroup]) -> Iterator[dict[str, float]]:
    names = list(dict.fromkeys(group.name for group in groups))
    for scales in itertools.product(*(_SCALES[name] for name in names)):
        yield dict(zip(names, scales, strict=True))


def _column_scales(groups: Sequence[FeatureGroup], size: int, scales: dict[str, float]) -> Array:
    columns = np.empty(size)
    for group in groups:
        columns[group.columns] = scales[group.name]
    return columns

"""Seconds as a sum of non-negative parts: least squares of relative errors, with error bars.

Letters: n measurements, P parts, R draws.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
from scipy.optimize import nnls

from gearshift.search.space import Array

DRAWS = 200
# Of a part's largest feature: what is less is rounding.
_TOLERANCE = 1e-6


@dataclass(frozen=True, eq=False)
class PositiveFit:
    """seconds = features @ weights, no weight negative.

    Attributes:
        features: (n, P), none negative.
        seconds: (n,) measured, positive.
        seed: of the draws.
    """

    features: Array
    seconds: Array
    seed: int = 0

    @cached_property
    def weights(self) -> Array:
        """(P,) of least squared relative error."""
        return self._solve(self.seconds)

    def _solve(self, seconds: Array) -> Array:
        scaled = self.features / self._scale / seconds[:, None]
        return nnls(scaled, np.ones(len(seconds)))[0] / self._scale

    @cached_property
    def _scale(self) -> Array:
        largest = self.features.max(axis=0)
        return np.where(largest > 0, largest, 1.0)

    @cached_property
    def freedom(self) -> int:
        """Measurements beyond the parts in use: none, and errors cannot be judged from within."""
        return len(self.seconds) - int((self.weights > 0).sum())

    @cached_property
    def deviations(self) -> Array:
        """(n,) measured over fitted seconds, less 1, widened for the parts that were fitted."""
        fitted = self.features @ self.weights
        return (self.seconds / fitted - 1) * np.sqrt(len(fitted) / max(self.freedom, 1))

    @cached_property
    def draws(self) -> Array:
        """Weights (R, P) refitted to seconds with resampled deviations (the residual bootstrap)."""
        rng = np.random.default_rng(self.seed)
        fitted = self.features @ self.weights
        chosen = rng.choice(self.deviations, size=(DRAWS, len(fitted)))
        # A deviation of -100% would be a step that takes no time.
        return np.stack([self._solve(fitted * np.maximum(1 + row, 0.01)) for row in chosen])

    def predict(self, features: Array) -> Array:
        """(m,) seconds of features (m, P)."""
        return features @ self.weights

    def samples(self, features: Array) -> Array:
        """(R, m) seconds that new measurements might have: other weights, and a deviation of their own."""
        rng = np.random.default_rng(self.seed + 1)
        noise = rng.choice(self.deviations, size=(DRAWS, len(features)))
        return (self.draws @ features.T) * np.maximum(1 + noise, 0.01)

    def settles(self, features: Array) -> bool:
        """Whether the measurements say what these features (m, P), or differences of such, amount to.

        They do if each row is a combination of measured ones: then every solution gives it the same seconds.
        """
        wanted = features / self._scale
        rest = wanted - wanted @ self._row_space.T @ self._row_space
        return bool((np.abs(rest) <= _TOLERANCE * np.maximum(1.0, np.abs(wanted))).all())

    @cached_property
    def _row_space(self) -> Array:
        """Orthonormal rows (rank, P) that span the scaled features."""
        _, sizes, rows = np.linalg.svd(self.features / self._scale, full_matrices=False)
        return rows[sizes > 1e-9 * sizes[0]]

"""How well a surrogate predicts: the figures, and the warning that a bad fit gets."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from scipy.stats import norm, rankdata
from sklearn.metrics import r2_score

from gearshift.search.space import Array

GOOD_SPEARMAN = 0.8
GOOD_R2 = 0.5
GOOD_COVERAGE = 0.75

_NINETY_PERCENT = float(norm.ppf(0.95))


@dataclass(frozen=True)
class Scores:
    """Predictions against values that the fit did not see.

    Attributes:
        rows: number of placements.
        r2: coefficient of determination.
        spearman: rank correlation.
        coverage: share of the values inside their 90% interval.
    """

    rows: int
    r2: float
    spearman: float
    coverage: float

    @classmethod
    def of(cls, values: Array, mean: Array, std: Array) -> Scores:
        """Compare predictions (n,) with values (n,); constant values or predictions have Spearman 0."""
        coverage = float(np.mean(np.abs(values - mean) <= _NINETY_PERCENT * std))
        constant = np.ptp(values) == 0 or np.ptp(mean) == 0
        spearman = 0.0 if constant else float(np.corrcoef(rankdata(values), rankdata(mean))[0, 1])
        return cls(len(values), float(r2_score(values, mean)), spearman, coverage)

    def __str__(self) -> str:
        return (
            f"R2 {self.r2:.3f}, Spearman {self.spearman:.3f}, "
            f"90% intervals cover {self.coverage:.0%} of {self.rows} placements"
        )


@dataclass(frozen=True)
class FitReport:
    """What a fit is worth.

    Attributes:
        rows: evaluated placements it was fitted to.
        order: the most layers that interact with one another in it.
        interaction_range: distance up to which they do.
        cross_validated: scores on rows left out in turn.
        held_out: scores on placements that were never fitted, if some were given.
    """

    rows: int
    order: int
    interaction_range: int
    cross_validated: Scores
    held_out: Scores | None = None

    @classmethod
    def from_json(cls, given: dict[str, Any]) -> FitReport:
        """Read the JSON form."""
        held_out = given["held_out"]
        scores = {
            "cross_validated": Scores(**given["cross_validated"]),
            "held_out": None if held_out is None else Scores(**held_out),
        }
        return cls(**{**given, **scores})

    def to_json(self) -> dict[str, Any]:
        """The JSON form."""
        return asdict(self)

    @property
    def warnings(self) -> list[str]:
        """One sentence for each figure that makes the frontier doubtful."""
        return list(self._complaints())

    def _complaints(self) -> Iterator[str]:
        kind = "on held-out placements" if self.held_out else "in cross-validation"
        judged = self.held_out or self.cross_validated
        if not judged.spearman >= GOOD_SPEARMAN:
            yield f"Spearman {judged.spearman:.2f} {kind} is below {GOOD_SPEARMAN}: it ranks placements badly"
        if not judged.r2 >= GOOD_R2:
            yield f"R2 {judged.r2:.2f} {kind} is below {GOOD_R2}: predicted values are far off"
        if not judged.coverage >= GOOD_COVERAGE:
            yield f"90% intervals cover only {judged.coverage:.0%} {kind}: they are too narrow"

    def __str__(self) -> str:
        interactions = f"interactions of up to {self.order} layers, {self.interaction_range} apart at most"
        lines = [
            f"surrogate: {self.rows} evaluated placements, "
            f"{interactions if self.order > 1 else 'no interactions'}",
            f"  cross-validated: {self.cross_validated}",
        ]
        if self.held_out:
            lines.append(f"  held out:        {self.held_out}")
        if self.warnings:
            lines += [f"  WARNING: {warning}" for warning in self.warnings]
            lines.append(
                "  WARNING: do not trust the frontier; evaluate more placements or train the mixers longer"
            )
        return "\n".join(lines)

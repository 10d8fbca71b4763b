"""Made-up supernets whose best placements are known, for judging searches."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from gearshift.placement import Placement, PlacementSpace
from gearshift.search.features import FeatureSpace
from gearshift.search.optimize import ParetoPoint, best_within, pareto_placements
from gearshift.search.space import SINGLE, AdditiveScore, Array

# Mean harm of full attention, sliding attention, Gated DeltaNet and Kimi Delta Attention in a layer, and
# their costs.
_HARM = (0.0, 0.03, 0.1, 0.07)
COSTS = (8.0, 4.0, 1.0, 2.0)
# Standard deviations of what two and three layers add together, at each place and, smaller, wherever they
# stand.
_PAIR, _TRIPLE, _EVERYWHERE = 0.01, 0.005, 20**-0.5
# Standard deviation of the noise, in parts of the range of the true frontier.
NOISE = 0.01
_BUDGETS = 100


@dataclass(frozen=True, eq=False)
class Truth:
    """A made-up supernet.

    Attributes:
        score: the true quality.
        layer_costs: (num_layers, mixers).
        frontier: the true one.
    """

    score: AdditiveScore
    layer_costs: Array
    frontier: tuple[ParetoPoint, ...]

    @property
    def span(self) -> float:
        """The range of true quality along the frontier."""
        return self.frontier[-1].value - self.frontier[0].value

    def evaluate(self, placements: Sequence[Placement], rng: np.random.Generator) -> list[dict[str, object]]:
        """Evaluation rows with noise."""
        noise = NOISE * self.span * rng.normal(size=len(placements))
        return [
            {"checkpoint": "made up", "data": "made up", "placement": str(placement), "quality": quality}
            for placement, quality in zip(
                placements, (self.score.values(placements) + noise).tolist(), strict=True
            )
        ]

    def regrets(self, found: Sequence[ParetoPoint]) -> Array:
        """How much worse than the best the found frontier is in truth, by budget, as shares of the range.

        Args:
            found: by rising cost; their values are not looked at beyond choosing the best at a budget.
        """
        cheapest = max(self.frontier[0].cost, found[0].cost)
        budgets = np.linspace(cheapest, self.frontier[-1].cost, _BUDGETS)
        chosen = [best_within(found, budget).placement for budget in budgets]
        best = np.array([best_within(self.frontier, budget).value for budget in budgets])
        return (best - self.score.values(chosen)) / self.span


def make_truth(layers: int, seed: int) -> Truth:
    """Harm by layer and mixer, and interactions of two and three layers up to three apart."""
    rng = np.random.default_rng(seed)
    features = FeatureSpace(PlacementSpace(layers), order=3, interaction_range=3)
    scale = {1: 0.0, 2: _PAIR, 3: _TRIPLE}
    variances = {
        group: (scale[group.order] * (1.0 if group.by_layer else _EVERYWHERE)) ** 2
        for group in features.groups
    }
    terms = dict(features.score_of_weights(0.0, features.draw_weights(variances, rng)).terms)
    terms[SINGLE] = -rng.gamma(2.0, 0.5, size=(layers, len(_HARM))) * _HARM
    score = AdditiveScore(features.space, 0.0, terms)
    costs = np.tile(COSTS, (layers, 1))
    return Truth(score, costs, tuple(pareto_placements(score, costs)))

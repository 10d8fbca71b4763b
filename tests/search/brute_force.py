"""Every placement of a small space, looked at one by one: what the optimisers are compared with."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import numpy as np

from gearshift.placement import MIXERS, PlacementSpace
from gearshift.search.space import AdditiveScore, Array

# Multiples of this add up exactly, so that scores can be compared without a tolerance.
GRAIN = 1 / 1024


def random_score(
    rng: np.random.Generator, space: PlacementSpace, order: int, reach: int, tied: bool = False
) -> AdditiveScore:
    """Random terms for clusters of up to ``order`` layers up to ``reach`` apart; tied ones repeat a lot."""
    length, mixers = space.num_layers, len(space.mixers)
    most = 2 if tied else 4096
    terms = {}
    for size in range(1, order + 1):
        for others in itertools.combinations(range(1, min(reach, length - 1) + 1), size - 1):
            offsets = (0, *others)
            shape = (length - offsets[-1], *(mixers,) * size)
            terms[offsets] = GRAIN * rng.integers(-most, most + 1, shape)
    return AdditiveScore(space, GRAIN * int(rng.integers(-most, most)), terms)


def random_space(rng: np.random.Generator, layers: int, mixers: int, restricted: bool) -> PlacementSpace:
    names = MIXERS[:mixers]
    if not restricted:
        return PlacementSpace(layers, names)
    held = [[name for name in names if rng.random() < 0.6] or [names[0]] for _ in range(layers)]
    held[int(rng.integers(layers))] = list(names)
    return PlacementSpace(layers, names, tuple(map(tuple, held)))


class Everything:
    """All placements that meet a condition, with whole costs and exact values."""

    def __init__(
        self, score: AdditiveScore, costs: Array, meets: Callable[[np.ndarray], np.ndarray] | None = None
    ) -> None:
        space = score.space
        options = [[space.mixers.index(name) for name in names] for names in space.layers]
        chosen = np.array(list(itertools.product(*options)))
        if meets is not None:
            chosen = chosen[meets(chosen)]
        self.chosen = chosen
        self.costs = costs[np.arange(space.num_layers), chosen].sum(axis=1)
        self.values = score.values_of(chosen)

    def frontier(self) -> list[tuple[float, float]]:
        """(cost, best value within that cost) wherever the best value rises."""
        found: list[tuple[float, float]] = []
        for row in np.lexsort((-self.values, self.costs)):
            if not found or self.values[row] > found[-1][1]:
                found.append((float(self.costs[row]), float(self.values[row])))
        return found

    def best_values(self, budget: float, count: int) -> list[float]:
        """The highest values within a budget, falling."""
        return np.sort(self.values[self.costs <= budget])[::-1][:count].tolist()

"""The exact frontier of a score against an additive cost, by dynamic programming over the layers.

A state is the mixers of the last `range` layers, all that later layers can still interact with. Each state
keeps the (cost, score) pairs of its partial placements that no other of that state beats in both: any other
partial placement could be exchanged for one of these whatever follows, so nothing is lost.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gearshift.errors import GearshiftError
from gearshift.placement import Placement, PlacementSpace
from gearshift.search.space import AdditiveScore, Array

Integers = NDArray[np.int64]
# int64 where every sum of costs fits, else Python's integers.
ExactCosts = NDArray[Any]


class BudgetError(GearshiftError, ValueError):
    """No placement costs as little as the budget."""


@dataclass(frozen=True)
class ParetoPoint:
    """A placement that no other beats in both cost and score.

    Attributes:
        cost: sum of its layer costs.
        value: its score.
        placement: one mixer per layer.
    """

    cost: float
    value: float
    placement: Placement


@dataclass(frozen=True)
class _State:
    """Undominated partial placements that end in the same mixers, by rising cost and rising value.

    Attributes:
        costs: (n,) in units of which every layer cost is a multiple.
        values: (n,).
        mixers: (n,) mixer of the last layer.
        origins: (n,) the partial placement without that layer: its row among all states before it.
    """

    costs: ExactCosts
    values: Array
    mixers: Integers
    origins: Integers


def pareto_placements(score: AdditiveScore, layer_costs: Array) -> list[ParetoPoint]:
    """Every point of the exact frontier, by rising cost; one placement for each point.

    Where several placements share a point, one of them is returned.

    Costs are added exactly, as whole numbers of a unit. Floating point would make several costs of one sum
    in different orders, and a frontier of 48 layers with equal costs per mixer would drown in copies; a
    tolerance that merged them could also merge costs that really differ.

    Args:
        score: what to maximise.
        layer_costs: (num_layers, mixers), finite, not negative.
    """
    assert layer_costs.shape == score.layers.shape
    assert np.isfinite(layer_costs).all() and (layer_costs >= 0).all() and np.isfinite(score.layers).all()
    costs, unit = _whole_costs(layer_costs)
    nothing = np.zeros(1, np.int64)
    states = {0: _State(nothing.astype(costs.dtype), np.full(1, score.constant), nothing, nothing)}
    steps: list[tuple[Integers, Integers]] = []
    for layer in range(score.space.num_layers):
        states = _extend(states, score, costs[layer], layer)
        steps.append((_joined(states.values(), "mixers"), _joined(states.values(), "origins")))
    final = _undominated(states.values())
    placements = _trace_back(steps[:-1], final, score.space)
    totals = [float(cost * unit) for cost in final.costs.tolist()]
    return [ParetoPoint(*point) for point in zip(totals, final.values.tolist(), placements, strict=True)]


def best_within(points: Sequence[ParetoPoint], budget: float) -> ParetoPoint:
    """The point of highest value that costs at most ``budget``.

    A cost that exceeds the budget by no more than the rounding of decimal numbers (1e-12 of it) is within it:
    five layers of 0.14 are affordable at 0.7.

    Args:
        points: a frontier, by rising cost.
        budget: in the cost's unit.

    Raises:
        BudgetError: even the cheapest placement costs more; the message names it.
    """
    affordable = [point for point in points if point.cost <= budget * (1 + 1e-12)]
    if not affordable:
        raise BudgetError(
            f"the budget {budget:g} cannot be met: the cheapest placement, {points[0].placement}, "
            f"costs {points[0].cost:g}; give at least that"
        )
    return affordable[-1]


def _whole_costs(layer_costs: Array) -> tuple[ExactCosts, Fraction]:
    """The costs as whole numbers (num_layers, mixers) of a unit, and the unit.

    A float is a whole number over a power of two, so that the largest of these powers serves all.
    """
    ratios = [[cost.as_integer_ratio() for cost in row] for row in layer_costs.tolist()]
    common = max(below for row in ratios for _, below in row)
    whole = [[above * (common // below) for above, below in row] for row in ratios]
    fits = sum(max(row) for row in whole) <= np.iinfo(np.int64).max
    return np.array(whole, dtype=np.int64 if fits else np.object_), Fraction(1, common)


def _extend(
    before: dict[int, _State], score: AdditiveScore, costs: ExactCosts, layer: int
) -> dict[int, _State]:
    """The states after ``layer`` by their number, from those before it."""
    mixers = len(score.space.mixers)
    kept = mixers ** min(layer + 1, len(score.pairs))
    allowed = [score.space.mixers.index(mixer) for mixer in score.space.allowed(layer)]
    arriving: dict[int, list[_State]] = {}
    first = 0
    for number, state in before.items():
        rows = np.arange(first, first + len(state.costs))
        first += len(rows)
        gains = _gains(score, layer, number)
        for mixer in allowed:
            moved = _State(
                state.costs + costs[mixer], state.values + gains[mixer], np.full(len(rows), mixer), rows
            )
            arriving.setdefault((number * mixers + mixer) % kept, []).append(moved)
    return {number: _undominated(states) for number, states in arriving.items()}


def _gains(score: AdditiveScore, layer: int, state: int) -> list[float]:
    """For each mixer, what it adds to the score at ``layer`` after ``state``.

    The digits of a state's number in base `mixers` are the mixers of the last layers, the latest the lowest.
    """
    mixers = len(score.space.mixers)
    gains = score.layers[layer].copy()
    for distance, pair in enumerate(score.pairs[:layer], start=1):
        earlier = state // mixers ** (distance - 1) % mixers
        gains += pair[layer - distance, earlier]
    return gains.tolist()


def _joined(states: Iterable[_State], field: str) -> NDArray[Any]:
    return np.concatenate([getattr(state, field) for state in states])


def _undominated(states: Collection[_State]) -> _State:
    """Join states and keep what no other row beats; of equal rows one stays."""
    costs, values = _joined(states, "costs"), _joined(states, "values")
    # Each state is sorted already, and the stable sort is a merge sort that makes use of sorted runs.
    order = np.argsort(costs, kind="stable")
    best = np.maximum.accumulate(values[order])
    order = order[np.concatenate([[True], values[order][1:] > best[:-1]])]
    # What is left rises in value, so that the last of several rows of one cost is the best of them.
    order = order[np.concatenate([costs[order][1:] != costs[order][:-1], [True]])]
    mixers, origins = _joined(states, "mixers"), _joined(states, "origins")
    return _State(costs[order], values[order], mixers[order], origins[order])


def _trace_back(
    steps: Sequence[tuple[Integers, Integers]], final: _State, space: PlacementSpace
) -> list[Placement]:
    """The placement of each row of ``final``, following the origins through all layers but the last."""
    chosen, rows = [final.mixers], final.origins
    for mixers, origins in reversed(steps):
        chosen.append(mixers[rows])
        rows = origins[rows]
    by_row = np.stack(chosen[::-1], axis=1).tolist()
    return [Placement(tuple(space.mixers[mixer] for mixer in mixers)) for mixers in by_row]

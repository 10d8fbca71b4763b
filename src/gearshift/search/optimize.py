"""The exact frontier of a score against an additive cost, by dynamic programming over the layers.

A state is the mixers of the last `reach` layers, all that later layers can still interact with, and how many
layers have a mixer whose count is constrained. Each state keeps the labels (cost, score and, under a limit,
use of it) of its partial placements that no other of that state beats: any other partial placement could be
exchanged for one of these whatever follows, so nothing is lost.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction

import numpy as np
from numpy.typing import NDArray

from gearshift.errors import GearshiftError
from gearshift.placement import Placement
from gearshift.search.constraints import NO_CONSTRAINTS, ConstraintError, Constraints, Limit
from gearshift.search.labels import ExactCosts, Labels, undominated
from gearshift.search.space import AdditiveScore, Array, placement_of


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


def pareto_placements(
    score: AdditiveScore, layer_costs: Array, constraints: Constraints = NO_CONSTRAINTS, count: int = 1
) -> list[ParetoPoint]:
    """Every point of the exact frontier, by rising cost; one placement for each point.

    Where several placements share a point, one of them is returned. With ``count`` above 1 the points are all
    those, and some more, that are among the ``count`` best at some budget; `best_within` picks them.

    Costs are added exactly, as whole numbers of a unit. Floating point would make several costs of one sum
    in different orders, and a frontier of 48 layers with equal costs per mixer would drown in copies; a
    tolerance that merged them could also merge costs that really differ.

    Args:
        score: what to maximise.
        layer_costs: (num_layers, mixers), finite, not negative.
        constraints: what placements must keep to, with one limit at most: more of them make labels that
            hardly ever beat each other, and are for `gearshift.search.program`.
        count: how many of the best at each budget.

    Raises:
        ConstraintError: no placement keeps to the constraints; the message names the one in the way, and a
            placement that keeps to all others.
    """
    assert layer_costs.shape == (score.space.num_layers, len(score.space.mixers))
    assert np.isfinite(layer_costs).all() and (layer_costs >= 0).all()
    costs, unit = whole_costs(layer_costs)
    search = _Search(score, costs, constraints, count)
    final, steps = search.run()
    if final is None:
        raise ConstraintError(_explain(score, constraints))
    chosen = _trace_back(steps, final)
    totals = [float(cost * unit) for cost in final.costs.tolist()]
    return [
        ParetoPoint(cost, value, placement_of(score.space, mixers))
        for cost, value, mixers in zip(totals, final.values.tolist(), chosen, strict=True)
    ]


def ranked_within(points: Sequence[ParetoPoint], budget: float) -> list[ParetoPoint]:
    """The points that cost at most ``budget``, by falling value.

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
    return sorted(affordable, key=lambda point: -point.value)


def best_within(points: Sequence[ParetoPoint], budget: float) -> ParetoPoint:
    """The point of highest value that costs at most ``budget``; see `ranked_within`.

    Raises:
        BudgetError: even the cheapest placement costs more; the message names it.
    """
    return ranked_within(points, budget)[0]


def whole_costs(layer_costs: Array) -> tuple[ExactCosts, Fraction]:
    """The costs as whole numbers (num_layers, mixers) of a unit, and the unit.

    A float is a whole number over a power of two, so that the largest of these powers serves all.
    """
    ratios = [[cost.as_integer_ratio() for cost in row] for row in layer_costs.tolist()]
    common = max(below for row in ratios for _, below in row)
    whole = [[above * (common // below) for above, below in row] for row in ratios]
    fits = sum(max(row) for row in whole) <= np.iinfo(np.int64).max
    return np.array(whole, dtype=np.int64 if fits else np.object_), Fraction(1, common)


def _explain(score: AdditiveScore, constraints: Constraints) -> str:
    """Why no placement keeps to the constraints, and one that keeps to all but one of them."""
    for left_out, others in constraints.without_one():
        free = np.zeros((score.space.num_layers, len(score.space.mixers)))
        goal = AdditiveScore(score.space, 0.0, {})
        for limit in constraints.limits:
            # The placement that comes nearest to what is left out, where that is a matter of degree.
            if str(limit) == left_out:
                terms = {offsets: -limit.sign * term for offsets, term in limit.score.terms.items()}
                goal = AdditiveScore(score.space, -limit.sign * limit.score.constant, terms)
        try:
            (nearest,) = pareto_placements(goal, free, others)
        except ConstraintError:
            continue
        reached = "".join(
            f", whose {limit.name} is {limit.score.values([nearest.placement])[0]:g}"
            for limit in constraints.limits
            if str(limit) == left_out
        )
        return (
            f"no placement has {constraints}; without {left_out} there are some, "
            f"such as {nearest.placement}{reached}: loosen it, or another one"
        )
    return f"no placement has {constraints}, nor without any one of them; loosen several"


@dataclass(frozen=True)
class _Counted:
    """A mixer whose layers are counted, up to ``cap``: further ones change nothing, or are too many."""

    mixer: int
    least: int
    most: int | None

    @property
    def cap(self) -> int:
        return self.least if self.most is None else self.most


# The mixers of the last layers as a number in base `mixers`, the latest the lowest digit; then the counts.
_State = tuple[int, ...]


class _Search:
    """One run over the layers."""

    def __init__(self, score: AdditiveScore, costs: ExactCosts, constraints: Constraints, count: int) -> None:
        assert all(np.isfinite(term).all() for term in score.terms.values())
        assert len(constraints.limits) <= 1, "several limits are for gearshift.search.program"
        self.score, self.costs, self.count = score, costs, count
        self.mixers = len(score.space.mixers)
        self.allowed = constraints.allowed(score.space)
        self.limit = constraints.limits[0] if constraints.limits else None
        self.reach = max(score.reach, self.limit.score.reach if self.limit else 0)
        names = dict.fromkeys((*constraints.at_least, *constraints.at_most))
        self.counted = [
            _Counted(
                score.space.mixers.index(name),
                constraints.at_least.get(name, 0),
                constraints.at_most.get(name),
            )
            for name in names
        ]
        # By layer, how many later ones can have each counted mixer.
        columns = self.allowed[:, [counted.mixer for counted in self.counted]]
        self.to_come = (columns.sum(axis=0) - columns.cumsum(axis=0)).tolist()
        self.use = _Use(self.limit, self.allowed, self.reach) if self.limit else None

    def run(self) -> tuple[Labels | None, list[tuple[NDArray[np.uint8], NDArray[np.int32]]]]:
        """The final labels, None where no placement is allowed, and each layer's mixers and origins."""
        nothing = np.zeros(1, np.int32)
        start = Labels(
            np.zeros(1, self.costs.dtype),
            np.full(1, self.score.constant),
            np.full(1, self.use.start if self.use else -np.inf),
            nothing.astype(np.uint8),
            nothing,
        )
        states: dict[_State, Labels] = {(0, *(0 for _ in self.counted)): start}
        steps = []
        for layer in range(self.score.space.num_layers):
            states = self._extend(states, layer)
            if not states:
                return None, []
            steps.append(
                (
                    np.concatenate([labels.mixers for labels in states.values()]),
                    np.concatenate([labels.origins for labels in states.values()]),
                )
            )
        return undominated(list(states.values()), self.count), steps[:-1]

    def _extend(self, before: dict[_State, Labels], layer: int) -> dict[_State, Labels]:
        """The states after ``layer``, from those before it."""
        gains = self.score.gains(layer).reshape(-1, self.mixers).tolist()
        arriving: dict[_State, list[Labels]] = {}
        first = 0
        for state, labels in before.items():
            rows = np.arange(first, first + len(labels), dtype=np.int32)
            first += len(rows)
            for mixer, after in self._next(state, layer):
                moved = Labels(
                    labels.costs + self.costs[layer, mixer],
                    labels.values + gains[state[0] % len(gains)][mixer],
                    labels.used,
                    np.full(len(rows), mixer, np.uint8),
                    rows,
                )
                if self.use:
                    moved = self.use.spend(moved, layer, state[0], mixer, after[0])
                if len(moved):
                    arriving.setdefault(after, []).append(moved)
        return {state: undominated(labels, self.count) for state, labels in arriving.items()}

    def _next(self, state: _State, layer: int) -> Iterator[tuple[int, _State]]:
        """The mixers that ``layer`` can have after ``state`` and the states that they lead to."""
        kept = self.mixers ** min(layer + 1, self.reach)
        for mixer in np.flatnonzero(self.allowed[layer]).tolist():
            counts = []
            for counted, so_far, to_come in zip(self.counted, state[1:], self.to_come[layer], strict=True):
                now = so_far + (counted.mixer == mixer)
                if (counted.most is not None and now > counted.most) or now + to_come < counted.least:
                    break
                counts.append(min(now, counted.cap))
            else:
                yield mixer, ((state[0] * self.mixers + mixer) % kept, *counts)


class _Use:
    """How much of a limit partial placements use, and what the layers to come use at least and at most."""

    def __init__(self, limit: Limit, allowed: NDArray[np.bool_], reach: int) -> None:
        self.most = limit.most
        self.start = limit.sign * limit.score.constant
        length, self.mixers = allowed.shape
        self.gains = [
            limit.sign * limit.score.gains(layer).reshape(-1, self.mixers) for layer in range(length)
        ]
        self.least = self._to_come(allowed, reach, np.min, np.inf)
        self.highest = self._to_come(allowed, reach, np.max, -np.inf)

    def _to_come(
        self, allowed: NDArray[np.bool_], reach: int, best: Callable[..., Array], worst: float
    ) -> list[Array]:
        """For each layer, by the mixers before it, the least or most that it and all later ones use."""
        length = len(allowed)
        found = [np.zeros(self.mixers ** min(length, reach))]
        for layer in reversed(range(length)):
            windows = np.arange(self.mixers ** min(layer, reach))
            gains = self.gains[layer]
            then = (windows[:, None] * self.mixers + np.arange(self.mixers)) % len(found[0])
            total = np.where(allowed[layer], gains[windows % len(gains)] + found[0][then], worst)
            found.insert(0, best(total, axis=1))
        return found

    def spend(self, labels: Labels, layer: int, window: int, mixer: int, after: int) -> Labels:
        """The labels after ``layer`` that can still keep to the limit.

        Those that keep to it whatever follows are freed from it, which lets them beat others whatever these
        use.
        """
        gains = self.gains[layer]
        used = labels.used + gains[window % len(gains), mixer]
        free = used + self.highest[layer + 1][after] <= self.most
        used = np.where(free, -np.inf, used)
        kept = used + self.least[layer + 1][after] <= self.most
        return Labels(labels.costs, labels.values, used, labels.mixers, labels.origins).at(kept)


def _trace_back(
    steps: Sequence[tuple[NDArray[np.uint8], NDArray[np.int32]]], final: Labels
) -> list[list[int]]:
    """The mixers of each row of ``final``, following the origins through all layers but the last."""
    chosen, rows = [final.mixers], final.origins
    for mixers, origins in reversed(steps):
        chosen.append(mixers[rows])
        rows = origins[rows]
    return np.stack(chosen[::-1], axis=1).tolist()

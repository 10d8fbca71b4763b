"""Placements by mixed-integer programming (HiGHS): for what the dynamic program cannot hold, and to check it.

A placement is a path through the windows of `reach` + 1 neighbouring layers. One variable a window, with what
flows into a layer's windows flowing out of them, describes all paths without any gap between the linear
program and the whole numbers; budgets, counts, limits and mixers shared between placements are further rows.
The solver's dual bound proves how near to the best placement its answer is, and shares nothing with the
dynamic program.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import Bounds, LinearConstraint, milp
from scipy.sparse import csr_array

from gearshift.errors import GearshiftError
from gearshift.placement import Placement, PlacementSpace
from gearshift.search.constraints import NO_CONSTRAINTS, ConstraintError, Constraints
from gearshift.search.optimize import BudgetError, ParetoPoint
from gearshift.search.space import AdditiveScore, Array, placement_of

# Relative distance of bound and value below which an answer counts as proven best.
GAP = 1e-6
_OPTIMAL, _TIME_LIMIT, _INFEASIBLE = 0, 1, 2

# A linear form: numbers of variables, and their factors.
Numbers = NDArray[np.int64]
Form = tuple[Numbers, Array]


class ProgramError(GearshiftError, RuntimeError):
    """The solver found no answer in its time, and could not tell that there is none."""


@dataclass(frozen=True)
class Certified:
    """A placement with the proof of how good it is.

    Attributes:
        placement: one mixer per layer.
        cost: sum of its layer costs.
        value: its score.
        bound: no placement has a higher score; from the solver's dual bound.
    """

    placement: Placement
    cost: float
    value: float
    bound: float

    @property
    def proven(self) -> bool:
        """Whether no placement is better, but for rounding."""
        return self.bound - self.value <= GAP * max(1.0, abs(self.value))


def best_by_program(
    score: AdditiveScore,
    layer_costs: Array,
    budget: float = np.inf,
    constraints: Constraints = NO_CONSTRAINTS,
    seconds: float = 60.0,
) -> Certified:
    """The placement of highest score within a budget, under any number of limits.

    Args:
        score: what to maximise.
        layer_costs: (num_layers, mixers), not negative.
        budget: in the costs' unit.
        constraints: what it must keep to.
        seconds: when to stop; what was found until then is returned with its bound.

    Raises:
        BudgetError: a placement keeps to the constraints, but none within the budget; the message names the
            cheapest one.
        ConstraintError: no placement keeps to the constraints.
        ProgramError: there was no answer in time.
    """
    program = Program(seconds)
    path = program.add_path(score.space, _reach(score, constraints))
    path.keep_to(constraints)
    if np.isfinite(budget):
        program.at_most(path.form_of_layers(layer_costs), budget * (1 + 1e-12))
    program.maximise(path.form(score))
    solved = program.solve()
    if solved is None:
        raise _infeasible(score, layer_costs, budget, constraints, seconds)
    placement = path.placement(solved.values)
    value = float(score.values([placement])[0])
    return Certified(
        placement, _cost(placement, score.space, layer_costs), value, solved.bound + score.constant
    )


def _infeasible(
    score: AdditiveScore, layer_costs: Array, budget: float, constraints: Constraints, seconds: float
) -> GearshiftError:
    if not np.isfinite(budget):
        return ConstraintError(f"no placement has {constraints}; loosen one of them")
    cheapest = best_by_program(
        AdditiveScore.of_layers(score.space, -layer_costs),
        layer_costs,
        constraints=constraints,
        seconds=seconds,
    )
    return BudgetError(
        f"the budget {budget:g} cannot be met: the cheapest placement with {constraints}, "
        f"{cheapest.placement}, costs {cheapest.cost:g}; give at least that"
    )


def frontier_by_program(
    score: AdditiveScore, layer_costs: Array, constraints: Constraints, seconds: float = 60.0
) -> list[ParetoPoint]:
    """The frontier under any number of limits, by rising cost, one program a point: from the best downwards.

    The slow twin of `gearshift.search.optimize.pareto_placements`.

    Raises:
        ConstraintError: no placement keeps to the constraints.
        ProgramError: a point was not found and proven in time.
    """
    unit = _least_difference(layer_costs)
    points: list[ParetoPoint] = []
    budget = np.inf
    while True:
        try:
            best = best_by_program(score, layer_costs, budget, constraints, seconds)
        except BudgetError:
            return points[::-1]
        if not best.proven:
            raise ProgramError(f"the best placement at budget {budget:g} was not proven in {seconds:g} s")
        cheapest = _cheapest_as_good(best, score, layer_costs, constraints, seconds)
        assert not points or cheapest.cost < points[-1].cost, "the solver exceeded the budget"
        points.append(ParetoPoint(cheapest.cost, cheapest.value, cheapest.placement))
        budget = cheapest.cost - unit


def _least_difference(layer_costs: Array) -> float:
    """Costs that differ by less count as one: the solver's whole numbers are whole to 1e-6."""
    return 1e-5 * float(layer_costs.max(initial=0.0)) or 1.0


def _cheapest_as_good(
    best: Certified, score: AdditiveScore, layer_costs: Array, constraints: Constraints, seconds: float
) -> Certified:
    """Of the placements that score like ``best``, the cheapest."""
    program = Program(seconds)
    path = program.add_path(score.space, _reach(score, constraints))
    path.keep_to(constraints)
    slack = 1e-9 * max(1.0, abs(best.value))
    program.at_least(path.form(score), best.value - score.constant - slack)
    costs = AdditiveScore.of_layers(score.space, -layer_costs)
    program.maximise(path.form(costs))
    solved = program.solve()
    if solved is None:
        return best
    placement = path.placement(solved.values)
    value, cost = float(score.values([placement])[0]), _cost(placement, score.space, layer_costs)
    return Certified(placement, cost, value, best.bound) if cost < best.cost else best


def _reach(score: AdditiveScore, constraints: Constraints) -> int:
    return max([score.reach, *(limit.score.reach for limit in constraints.limits)])


def _cost(placement: Placement, space: PlacementSpace, layer_costs: Array) -> float:
    return float(AdditiveScore.of_layers(space, layer_costs).values([placement])[0])


@dataclass(frozen=True)
class Solved:
    """A solver's answer: values of the variables, and a bound on what any others can reach."""

    values: Array
    bound: float


@dataclass
class Program:
    """A mixed-integer program that is being put together.

    Attributes:
        seconds: the solver's time limit.
    """

    seconds: float
    size: int = 0
    _rows: list[tuple[Form, float, float]] = field(default_factory=list)
    _whole: list[Numbers] = field(default_factory=list)
    _goal: list[Form] = field(default_factory=list)

    def add_variables(self, count: int, whole: bool) -> Numbers:
        """Variables from 0 to 1; their numbers."""
        numbers = np.arange(self.size, self.size + count)
        self.size += count
        if whole:
            self._whole.append(numbers)
        return numbers

    def add_path(self, space: PlacementSpace, reach: int) -> Path:
        """Variables and rows of one placement."""
        return Path(self, space, reach)

    def add_row(self, form: Form, least: float, most: float) -> None:
        """Keep a form between two numbers.

        The solver's tolerance is absolute, so that forms are scaled to one size: seconds are small, bytes
        large.
        """
        scale = 1e3 / float(np.abs(form[1]).max(initial=0.0) or 1.0) if least != most else 1.0
        self._rows.append(((form[0], form[1] * scale), least * scale, most * scale))

    def at_most(self, form: Form, bound: float) -> None:
        """Keep a form from exceeding a number."""
        self.add_row(form, -np.inf, bound)

    def at_least(self, form: Form, bound: float) -> None:
        """Keep a form from falling below a number."""
        self.add_row(form, bound, np.inf)

    def maximise(self, form: Form) -> None:
        """Add a form to what is maximised."""
        self._goal.append(form)

    def solve(self) -> Solved | None:
        """The best values, or those found in time; None if there are none.

        Raises:
            ProgramError: nothing was found in time.
        """
        goal = np.zeros(self.size)
        for numbers, factors in self._goal:
            np.add.at(goal, numbers, factors)
        scale = 1e3 / float(np.abs(goal).max(initial=0.0) or 1.0)
        whole = np.zeros(self.size)
        whole[np.concatenate(self._whole)] = 1
        found = milp(
            -goal * scale,
            constraints=self._matrix(),
            integrality=whole,
            bounds=Bounds(0, 1),
            options={"time_limit": self.seconds, "mip_rel_gap": 1e-9},
        )
        if found.status == _INFEASIBLE:
            return None
        if found.status not in (_OPTIMAL, _TIME_LIMIT) or found.x is None:
            raise ProgramError(
                f"the solver found no placement in {self.seconds:g} s; give it more time or fewer constraints"
            )
        return Solved(found.x, -float(found.mip_dual_bound) / scale)

    def _matrix(self) -> LinearConstraint:
        lengths = [len(numbers) for (numbers, _), _, _ in self._rows]
        rows = np.repeat(np.arange(len(self._rows)), lengths)
        columns = np.concatenate([numbers for (numbers, _), _, _ in self._rows])
        factors = np.concatenate([factors for (_, factors), _, _ in self._rows])
        matrix = csr_array((factors, (rows, columns)), shape=(len(self._rows), self.size))
        least, most = (np.array([row[side] for row in self._rows]) for side in (1, 2))
        return LinearConstraint(matrix, least, most)  # pyright: ignore[reportArgumentType] - its stubs know no arrays


class Path:
    """One placement among the variables of a program.

    Attributes:
        uses: (num_layers, mixers) numbers of the variables that say whether a layer has a mixer.
    """

    def __init__(self, program: Program, space: PlacementSpace, reach: int) -> None:
        self.program, self.space, self.reach = program, space, reach
        self.mixers = len(space.mixers)
        shape = space.num_layers, self.mixers
        self.uses = program.add_variables(shape[0] * shape[1], whole=True).reshape(shape)
        # By layer (windows before it, mixers), the windows as numbers in base `mixers`, the latest mixer
        # lowest.
        self.windows = [
            program.add_variables(self.mixers ** (min(layer, reach) + 1), whole=False).reshape(
                -1, self.mixers
            )
            for layer in range(space.num_layers)
        ]
        self._flow()
        self._forbid(NO_CONSTRAINTS.allowed(space))

    def _flow(self) -> None:
        program = self.program
        program.add_row(_ones(self.windows[0]), 1, 1)
        for layer, windows in enumerate(self.windows):
            for mixer in range(self.mixers):
                program.add_row(_difference(windows[:, mixer], self.uses[layer, mixer : mixer + 1]), 0, 0)
            if layer + 1 < len(self.windows):
                after = self.windows[layer + 1]
                into = np.arange(windows.size).reshape(windows.shape) % len(after)
                for window, leaving in enumerate(after):
                    program.add_row(_difference(windows[into == window], leaving), 0, 0)

    def _forbid(self, allowed: NDArray[np.bool_]) -> None:
        if not allowed.all():
            self.program.add_row(_ones(self.uses[~allowed]), 0, 0)

    def keep_to(self, constraints: Constraints) -> None:
        """Add rows for constraints.

        Raises:
            ConstraintError: they make no sense for the model.
        """
        self._forbid(constraints.allowed(self.space))
        for counts, add in (
            (constraints.at_least, self.program.at_least),
            (constraints.at_most, self.program.at_most),
        ):
            for mixer, count in counts.items():
                add(_ones(self.uses[:, self.space.mixers.index(mixer)]), count)
        for limit in constraints.limits:
            numbers, factors = self.form(limit.score)
            self.program.at_most(
                (numbers, limit.sign * factors), limit.most - limit.sign * limit.score.constant
            )

    def form(self, score: AdditiveScore) -> Form:
        """A score without its constant."""
        factors = []
        for layer, windows in enumerate(self.windows):
            gains = score.gains(layer).reshape(-1, self.mixers)
            factors.append(gains[np.arange(len(windows)) % len(gains)].ravel())
        return np.concatenate([windows.ravel() for windows in self.windows]), np.concatenate(factors)

    def form_of_layers(self, per_layer: Array) -> Form:
        """A sum over layers, from (num_layers, mixers)."""
        return self.uses.ravel(), per_layer.ravel().astype(np.float64)

    def placement(self, values: Array) -> Placement:
        """The placement that a solver's values mean."""
        return placement_of(self.space, values[self.uses].argmax(axis=1).tolist())


def _ones(numbers: Numbers) -> Form:
    return numbers.ravel(), np.ones(numbers.size)


def _difference(one: Numbers, other: Numbers) -> Form:
    parts: Sequence[Numbers] = one.ravel(), other.ravel()
    return np.concatenate(parts), np.repeat([1.0, -1.0], [part.size for part in parts])

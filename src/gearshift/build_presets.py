"""Presets by workload and retention: the fastest placement that keeps so much of the teacher's quality.

Each can be chosen for itself, or all together under a ceiling for the bytes of weights that a thinned
supernet with all of them takes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

import numpy as np
from scipy.stats import norm

from gearshift.errors import GearshiftError
from gearshift.placement import Placement
from gearshift.presets import Preset
from gearshift.search import (
    NO_CONSTRAINTS,
    AdditiveScore,
    Constraints,
    CostModel,
    FrontierPoint,
    Surrogate,
    build_frontier,
)
from gearshift.search.frontier import TEACHER
from gearshift.search.program import Path as PlacementPath
from gearshift.search.program import Program
from gearshift.search.space import Array

Row = Mapping[str, Any]

# How sure a cautious choice is that the placement keeps its retention.
_SURE = 0.9


class PresetBuildError(GearshiftError, ValueError):
    """Presets that cannot be had."""


@dataclass(frozen=True)
class Wish:
    """A preset to find.

    Attributes:
        name: of the preset.
        cost: the workload's cost model.
        retention: the least share of the teacher's quality.
    """

    name: str
    cost: CostModel
    retention: float

    def missed_by(self, retention: float | None) -> bool:
        """Whether a measured retention is below the wish."""
        return retention is not None and retention < self.retention


@dataclass(frozen=True)
class Built:
    """A preset and what is known of it.

    Attributes:
        wish: what was asked for.
        point: its predictions for the workload.
    """

    wish: Wish
    point: FrontierPoint

    def preset(self, teacher_quality: float | None) -> Preset:
        """The preset without measurements."""
        predicted = None if teacher_quality is None else teacher_quality * self.point.retention
        return Preset(self.wish.name, self.point.placement, predicted_quality=predicted)


def make_wishes(costs: Sequence[CostModel], retentions: Sequence[float]) -> list[Wish]:
    """A wish for each workload and retention: ``r97``, or ``r97-2048x8`` where there are several workloads.

    Raises:
        PresetBuildError: a retention is not between 0 and 1, or given twice.
    """
    wrong = [level for level in retentions if not 0 < level <= 1]
    if wrong or len(set(retentions)) != len(retentions) or not retentions:
        raise PresetBuildError(
            f"the retentions {list(retentions)}; expected different shares of the teacher's quality, 0 to 1"
        )
    return [
        Wish(
            f"r{100 * level:.6g}" + (f"-{cost.context_length}x{cost.batch_size}" if len(costs) > 1 else ""),
            cost,
            level,
        )
        for cost, level in product(costs, sorted(retentions, reverse=True))
    ]


def teacher_preset(surrogate: Surrogate) -> Preset:
    """All-FA, to which every retention and speed-up refers."""
    quality = surrogate.table.teacher_quality
    placement = surrogate.table.space.teacher()
    return Preset(TEACHER, placement, quality=quality, retention=1.0, predicted_quality=quality)


def choose_each(
    surrogate: Surrogate,
    wishes: Iterable[Wish],
    *,
    constraints: Constraints = NO_CONSTRAINTS,
    measured: Mapping[Placement, float] | None = None,
    cautious: bool = False,
) -> list[Built]:
    """For each wish the fastest placement of the frontier that is predicted to keep its retention.

    Args:
        surrogate: predicts quality.
        wishes: workloads and retentions.
        constraints: what placements must keep to.
        measured: retentions of evaluated placements; one that is known to keep less than asked is not taken.
        cautious: a prediction counts with what it keeps with a probability of 90%.

    Raises:
        PresetBuildError: no placement keeps so much; the message names the one that keeps most.
    """
    measured = measured or {}
    chosen = []
    frontiers: dict[int, Sequence[FrontierPoint]] = {}
    for wish in wishes:
        key = id(wish.cost)
        if key not in frontiers:
            frontiers[key] = build_frontier(surrogate, wish.cost, constraints).points
        points = [
            point
            for point in frontiers[key]
            if _kept(surrogate, point, cautious) >= wish.retention * (1 - 1e-12)
            and not wish.missed_by(measured.get(point.placement))
        ]
        if not points:
            best = max(frontiers[key], key=lambda point: _kept(surrogate, point, cautious))
            raise PresetBuildError(
                f"the preset {wish.name!r} asks for a retention of {wish.retention:g}; the best there is, "
                f"{best.placement}, keeps {_kept(surrogate, best, cautious):.4g} as predicted; ask for less"
            )
        chosen.append(Built(wish, points[-1]))
    return chosen


def _kept(surrogate: Surrogate, point: FrontierPoint, cautious: bool) -> float:
    """The retention that counts; the teacher keeps all, whatever the surrogate predicts of it."""
    if point.placement == surrogate.table.space.teacher():
        return 1.0
    if not cautious:
        return point.retention
    return surrogate.retention(point.predicted - float(norm.ppf(_SURE)) * point.predicted_std)


def choose_until_kept(
    choose: Callable[[Mapping[Placement, float]], list[Built]],
    evaluate: Callable[[Sequence[Placement]], Sequence[Row]],
    attempts: int = 4,
) -> list[Built]:
    """Choose, evaluate, and choose again in place of what keeps less than asked, a few times.

    Args:
        choose: chooses, given the measured retentions; it may fit anew to what was evaluated.
        evaluate: gives evaluation rows of placements.
        attempts: how often to choose at most; what then keeps too little stays, and its measurement says so.
    """
    measured: dict[Placement, float] = {}
    chosen = choose(measured)
    for _ in range(attempts - 1):
        placements = list(dict.fromkeys(built.point.placement for built in chosen))
        rows = evaluate(placements)
        measured |= {placement: row["retention"] for placement, row in zip(placements, rows, strict=True)}
        if not any(built.wish.missed_by(measured[built.point.placement]) for built in chosen):
            break
        chosen = choose(measured)
    return chosen


def choose_together(
    surrogate: Surrogate,
    wishes: Sequence[Wish],
    weight_bytes: Array,
    shared_bytes: int,
    ceiling: float,
    *,
    constraints: Constraints = NO_CONSTRAINTS,
    seconds: float = 120.0,
) -> list[Built]:
    """Placements for all wishes at once, whose mixers together fit under a ceiling of weights.

    The sum of their costs, each as a share of all-FA's, is least. A mixed-integer program: what one preset
    keeps in memory costs the others nothing, so that they cannot be chosen one by one.

    Args:
        surrogate: predicts quality.
        wishes: workloads and retentions.
        weight_bytes: (num_layers, mixers) of each mixer's weights.
        shared_bytes: of all other weights.
        ceiling: bytes of weights at most.
        constraints: what each placement must keep to.
        seconds: when the solver stops; the best that was found until then is taken.

    Raises:
        PresetBuildError: the ceiling is too low; the message says how much is needed. Or no placement keeps a
            retention.
        ProgramError: nothing was found in time.
    """
    program = Program(seconds)
    held, paths = _placements_that_share(program, surrogate, wishes, constraints)
    room = held.ravel(), weight_bytes.ravel().astype(np.float64)
    program.at_most(room, ceiling - shared_bytes)
    for path, wish in zip(paths, wishes, strict=True):
        costs = wish.cost.layer_costs(surrogate.table.space)
        whole = wish.cost.seconds(surrogate.table.space.teacher())
        program.maximise(path.form(AdditiveScore.of_layers(surrogate.table.space, -costs / whole)))
    solved = program.solve()
    if solved is None:
        raise PresetBuildError(
            _too_low(surrogate, wishes, weight_bytes, shared_bytes, ceiling, constraints, seconds)
        )
    return [
        Built(wish, build_point(surrogate, wish.cost, path.placement(solved.values)))
        for wish, path in zip(wishes, paths, strict=True)
    ]


def build_point(surrogate: Surrogate, cost: CostModel, placement: Placement) -> FrontierPoint:
    """A placement's predictions for a workload."""
    mean, std = (float(part[0]) for part in surrogate.predict([placement]))
    seconds, speed_up = cost.seconds(placement), cost.speed_up(placement)
    return FrontierPoint(placement, mean, std, surrogate.retention(mean), seconds, speed_up)


def _placements_that_share(
    program: Program, surrogate: Surrogate, wishes: Sequence[Wish], constraints: Constraints
) -> tuple[np.ndarray, list[PlacementPath]]:
    """Variables for mixers in memory (num_layers, mixers), and a placement of them for each wish."""
    space, score = surrogate.table.space, surrogate.score
    shape = space.num_layers, len(space.mixers)
    held = program.add_variables(shape[0] * shape[1], whole=True).reshape(shape)
    reach = max([score.reach, *(limit.score.reach for limit in constraints.limits)])
    paths = []
    for wish in wishes:
        path = program.add_path(space, reach)
        path.keep_to(constraints)
        asked = surrogate.table.target.value_at(wish.retention, surrogate.teacher_value)
        # The teacher keeps all, even where its own prediction falls short of that.
        least = min(asked, float(score.values([space.teacher()])[0]))
        program.at_least(path.form(score), least - score.constant)
        for use, kept in zip(path.uses.ravel(), held.ravel(), strict=True):
            program.at_most((np.array([use, kept]), np.array([1.0, -1.0])), 0.0)
        paths.append(path)
    return held, paths


def _too_low(
    surrogate: Surrogate,
    wishes: Sequence[Wish],
    weight_bytes: Array,
    shared_bytes: int,
    ceiling: float,
    constraints: Constraints,
    seconds: float,
) -> str:
    """Why there is nothing: the least bytes that would do, or the retention that nothing keeps."""
    program = Program(seconds)
    held, _ = _placements_that_share(program, surrogate, wishes, constraints)
    program.maximise((held.ravel(), -weight_bytes.ravel().astype(np.float64)))
    solved = program.solve()
    if solved is None:
        most = max(wish.retention for wish in wishes)
        return f"no placement with {constraints} is predicted to keep {most:g}; ask for less"
    least = shared_bytes + float(weight_bytes.ravel() @ solved.values[held.ravel()].round())
    return (
        f"the weights may take {ceiling:,.0f} bytes; {', '.join(wish.name for wish in wishes)} need at least "
        f"{least:,.0f} together: raise the ceiling or ask for less retention"
    )

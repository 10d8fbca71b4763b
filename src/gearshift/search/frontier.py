"""The frontier of predicted quality against cost, and presets chosen along it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from gearshift.errors import GearshiftError
from gearshift.placement import FULL_ATTENTION, Placement
from gearshift.presets import Preset
from gearshift.search.constraints import NO_CONSTRAINTS, Constraints
from gearshift.search.cost import CostModel
from gearshift.search.optimize import ParetoPoint, pareto_placements
from gearshift.search.program import frontier_by_program
from gearshift.search.surrogate import Surrogate

TEACHER = "teacher"

# Presets by default: how far each lies on the way from the teacher's speed to the highest speed-up.
_WAY = {"quality": 0.25, "balanced": 0.5, "fast": 0.75, "fastest": 1.0}


class FrontierError(GearshiftError, ValueError):
    """No placement of the frontier meets a target."""


@dataclass(frozen=True)
class FrontierPoint:
    """A placement that no other beats in both predicted quality and cost.

    Attributes:
        placement: one mixer per layer.
        predicted: value of the surrogate's target.
        predicted_std: standard deviation of an observation about it.
        retention: predicted quality over the teacher's.
        seconds: predicted seconds of a decode step.
        speed_up: all-FA's seconds over these.
    """

    placement: Placement
    predicted: float
    predicted_std: float
    retention: float
    seconds: float
    speed_up: float

    def to_json(self) -> dict[str, Any]:
        """The JSON form."""
        return {**vars(self), "placement": str(self.placement)}


@dataclass(frozen=True, eq=False)
class Frontier:
    """The frontier of one surrogate and one cost model.

    Attributes:
        points: by rising speed-up, and so by falling predicted quality.
        surrogate: predicts quality.
        cost: predicts seconds.
    """

    points: tuple[FrontierPoint, ...]
    surrogate: Surrogate
    cost: CostModel

    def predict(self, placements: Sequence[Placement]) -> list[FrontierPoint]:
        """The same predictions for any placements, on the frontier or not."""
        means, stds = self.surrogate.predict(placements)
        return [
            FrontierPoint(
                placement,
                mean,
                std,
                self.surrogate.retention(mean),
                self.cost.seconds(placement),
                self.cost.speed_up(placement),
            )
            for placement, mean, std in zip(placements, means.tolist(), stds.tolist(), strict=True)
        ]


def build_frontier(
    surrogate: Surrogate, cost: CostModel, constraints: Constraints = NO_CONSTRAINTS
) -> Frontier:
    """The exact frontier: every placement that is best for some number of seconds.

    Args:
        surrogate: predicts quality.
        cost: predicts seconds.
        constraints: what every placement but the teacher must keep to. With more than one limit the frontier
            is found by mixed-integer programs, one a point, in minutes instead of seconds.

    Raises:
        CostError: the cost model lacks one of the surrogate's mixers.
        ConstraintError: no placement keeps to the constraints.
        PlacementError: a layer holds no full attention, and speed-ups are those over all-FA.
    """
    surrogate.table.space.teacher()
    search = pareto_placements if len(constraints.limits) <= 1 else frontier_by_program
    best = search(surrogate.score, cost.layer_costs(surrogate.table.space), constraints)
    unsorted = Frontier((), surrogate, cost)
    points = unsorted.predict([point.placement for point in reversed(_apart(best, cost.base_seconds))])
    return Frontier(tuple(points), surrogate, cost)


def _apart(points: Sequence[ParetoPoint], base_seconds: float) -> list[ParetoPoint]:
    """Of points whose seconds agree to 9 digits, the one of highest quality; nobody could tell them apart."""
    faster = 0.0
    kept: list[ParetoPoint] = []
    for point in points:
        seconds = base_seconds + point.cost
        if kept and seconds <= faster * (1 + 1e-9):
            kept.pop()
        kept.append(point)
        faster = seconds
    return kept


def choose_presets(
    frontier: Frontier,
    *,
    speed_ups: Mapping[str, float] | None = None,
    retentions: Mapping[str, float] | None = None,
) -> list[Preset]:
    """Name the teacher and some placements of the frontier; no placement gets two names.

    Without targets the presets are spread evenly over the frontier's speed-ups: quality, balanced, fast,
    fastest. A target whose best placement already has a name gets the next faster one, or failing that the
    next slower one; where the frontier has fewer placements than there are names, the later names are left
    out.

    Args:
        frontier: where to choose.
        speed_ups: by name, the least predicted speed-up; the placement of highest predicted quality is taken.
        retentions: by name, the least predicted retention; the fastest placement is taken.

    Raises:
        FrontierError: no placement meets a target; the message names the nearest.
    """
    points = [point for point in frontier.points if point.speed_up > 1 and not _is_teacher(point.placement)]
    if speed_ups is None and retentions is None:
        speed_ups = _spread(points)
    chosen: dict[str, FrontierPoint] = {}
    for name, target in (speed_ups or {}).items():
        _choose(chosen, name, points, _slowest_at_least(points, name, target))
    for name, target in (retentions or {}).items():
        _choose(chosen, name, points, _fastest_retaining(points, name, target))
    return [_teacher_preset(frontier), *(_preset(frontier, name, point) for name, point in chosen.items())]


def _is_teacher(placement: Placement) -> bool:
    return set(placement) == {FULL_ATTENTION}


def _spread(points: Sequence[FrontierPoint]) -> dict[str, float]:
    """Speed-ups that the default names aim at; none where nothing is faster than the teacher."""
    return {name: 1 + way * (points[-1].speed_up - 1) for name, way in _WAY.items()} if points else {}


def _slowest_at_least(points: Sequence[FrontierPoint], name: str, speed_up: float) -> int:
    """Index of the first point, so the one of highest quality, with at least this speed-up."""
    for index, point in enumerate(points):
        if point.speed_up >= speed_up * (1 - 1e-12):
            return index
    raise FrontierError(
        f"the preset {name!r} asks for a speed-up of {speed_up:g}; the highest is "
        f"{points[-1].speed_up if points else 1.0:.4g}, so ask for no more"
    )


def _fastest_retaining(points: Sequence[FrontierPoint], name: str, retention: float) -> int:
    """Index of the last point, so the fastest one, with at least this retention."""
    for index in reversed(range(len(points))):
        if points[index].retention >= retention * (1 - 1e-12):
            return index
    raise FrontierError(
        f"the preset {name!r} asks for a retention of {retention:g}; below the teacher the highest "
        f"predicted one is {points[0].retention if points else 1.0:.4g}, so ask for no more"
    )


def _choose(chosen: dict[str, FrontierPoint], name: str, points: Sequence[FrontierPoint], index: int) -> None:
    """Give the name to the point at ``index``, or to the nearest without a name, faster ones first."""
    order = [*range(index, len(points)), *reversed(range(index))]
    free = [points[other] for other in order if points[other] not in chosen.values()]
    if free:
        chosen[name] = free[0]


def _teacher_preset(frontier: Frontier) -> Preset:
    quality = frontier.surrogate.table.teacher_quality
    placement = frontier.surrogate.table.space.teacher()
    return Preset(TEACHER, placement, quality=quality, retention=1.0, predicted_quality=quality)


def _preset(frontier: Frontier, name: str, point: FrontierPoint) -> Preset:
    teacher_quality = frontier.surrogate.table.teacher_quality
    predicted = None if teacher_quality is None else teacher_quality * point.retention
    return Preset(name, point.placement, predicted_quality=predicted)

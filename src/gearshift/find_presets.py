"""From rows of measurements to a frontier with presets, and the files that show them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import median
from typing import Any

from gearshift.errors import GearshiftError
from gearshift.files import write_json
from gearshift.placement import FULL_ATTENTION, Placement, PlacementSpace
from gearshift.presets import Measurement, Preset, write_presets
from gearshift.provenance import provenance
from gearshift.search import (
    NO_CONSTRAINTS,
    Constraints,
    CostModel,
    EvaluationTable,
    Frontier,
    Limit,
    Surrogate,
    build_frontier,
    build_table,
    choose_presets,
    fit_costs,
    fit_surrogate,
    fit_surrogates,
    save_costs,
    save_surrogate,
)
from gearshift.workload import Workload

FRONTIER_FORMAT = "gearshift-frontier-1"

Row = Mapping[str, Any]


class WorkloadNotMeasuredError(GearshiftError, ValueError):
    """A frontier is asked for at a context length that was not measured."""


@dataclass(frozen=True)
class Wishes:
    """What the placements of a frontier must keep to.

    Attributes:
        constraints: counts of mixers, fixed layers, limits.
        floors: by target, such as ``recall.copy``, the least that a surrogate of its own predicts.
    """

    constraints: Constraints = NO_CONSTRAINTS
    floors: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Found:
    """What a search found.

    Attributes:
        frontier: at the workload asked for.
        other_costs: cost models of the other measured workloads.
        presets: chosen along the frontier, with their measurements where there are some.
        held_out: evaluated placements that the surrogate was judged by.
        floors: the surrogates of the targets that have a floor.
    """

    frontier: Frontier
    other_costs: tuple[CostModel, ...]
    presets: tuple[Preset, ...]
    held_out: EvaluationTable | None = None
    floors: Mapping[str, Surrogate] = field(default_factory=dict)

    def with_presets(self, presets: Iterable[Preset]) -> Found:
        """The same search with other presets, or with the same ones once they are measured."""
        return replace(self, presets=tuple(presets))


def find_presets(
    evaluations: Sequence[Row],
    measurements: Sequence[Row],
    space: PlacementSpace,
    *,
    held_out: Sequence[Row] = (),
    context_length: int | None = None,
    target: str = "-sqrt(kl)",
    order: int | None = None,
    interaction_range: int | None = None,
    wishes: Wishes | None = None,
) -> Found:
    """Fit surrogate and costs, find the frontier and choose presets along it.

    Args:
        evaluations: rows of ``gearshift evaluate``.
        measurements: rows of ``gearshift bench``.
        space: the supernet's placements.
        held_out: further rows, of other placements, to judge the surrogate by.
        context_length: tokens of context that the frontier is for; None takes the longest measured.
        target: what the surrogate predicts, see `gearshift.search.Target`.
        order: the most layers that interact with one another; None lets the evidence choose.
        interaction_range: how far apart layers may interact; None lets the evidence choose.
        wishes: what the frontier's placements must keep to.

    Raises:
        WorkloadNotMeasuredError: there is no measurement at that context length.
        GearshiftError: rows that cannot be used; the message names them.
    """
    wishes = wishes or Wishes()
    judged = build_table(held_out, space, target) if held_out else None
    table = build_table(evaluations, space, target)
    surrogate = fit_surrogate(table, interaction_range, order=order, held_out=judged)
    floors = fit_surrogates({name: build_table(evaluations, space, name) for name in wishes.floors})
    costs = list(fit_costs(measurements, space).values())
    cost = choose_cost(costs, context_length)
    frontier = build_frontier(surrogate, cost, with_floors(wishes, floors))
    presets = with_measurements(choose_presets(frontier), evaluations, measurements)
    others = tuple(other for other in costs if other is not cost)
    return Found(frontier, others, tuple(presets), judged, floors)


def with_floors(wishes: Wishes, floors: Mapping[str, Surrogate]) -> Constraints:
    """The constraints with a limit for each floor."""
    limits = tuple(
        Limit(name, floors[name].score, least, floor=True) for name, least in wishes.floors.items()
    )
    return replace(wishes.constraints, limits=(*wishes.constraints.limits, *limits))


def choose_cost(costs: Sequence[CostModel], context_length: int | None) -> CostModel:
    """The model of that context, the longest by default; of several batch sizes the largest.

    Raises:
        WorkloadNotMeasuredError: there is no model of that context.
    """
    lengths = sorted({cost.context_length for cost in costs})
    wanted = lengths[-1] if context_length is None else context_length
    if wanted not in lengths:
        raise WorkloadNotMeasuredError(
            f"no decode step was measured at context length {wanted}; measured are {lengths}: "
            f"choose one of them, or run gearshift bench --context {wanted}"
        )
    return max((cost for cost in costs if cost.context_length == wanted), key=lambda cost: cost.batch_size)


def with_measurements(
    presets: Iterable[Preset], evaluations: Sequence[Row], measurements: Sequence[Row]
) -> list[Preset]:
    """Fill in what was measured of each preset's placement, and leave the rest as it is.

    A speed-up is the median step of all-FA over the preset's, at the same context length and batch size.
    """
    steps = _median_steps(measurements)
    evaluated = {Placement.of(row["placement"]): row for row in evaluations}
    return [_measured(preset, evaluated.get(preset.placement), steps) for preset in presets]


_Steps = dict[tuple[int, int, str], dict[Placement, float]]


def _median_steps(measurements: Iterable[Row]) -> _Steps:
    """Median seconds of a step by (context length, batch size, hardware), then by placement."""
    grouped: dict[tuple[int, int, str], dict[Placement, list[float]]] = {}
    for row in measurements:
        workload = (row["context_length"], row["batch_size"], row["hardware"])
        steps = grouped.setdefault(workload, {})
        steps.setdefault(Placement.of(row["placement"]), []).append(row["seconds_per_step"])
    return {
        workload: {placement: median(seconds) for placement, seconds in steps.items()}
        for workload, steps in grouped.items()
    }


def _measured(preset: Preset, evaluation: Row | None, steps: _Steps) -> Preset:
    teacher = Placement.uniform(FULL_ATTENTION, len(preset.placement))
    measurements = tuple(
        Measurement(
            Workload(context, concurrency=batch),
            seconds_per_token=by_placement[preset.placement] / batch,
            speed_up=by_placement[teacher] / by_placement[preset.placement],
            hardware=hardware,
        )
        for (context, batch, hardware), by_placement in sorted(steps.items())
        if preset.placement in by_placement and teacher in by_placement
    )
    if evaluation is None:
        return replace(preset, measurements=measurements)
    quality, retention = evaluation["quality"], evaluation["retention"]
    return replace(preset, quality=quality, retention=retention, measurements=measurements)


def write_found(found: Found, out: Path, supernet: Path | None = None) -> None:
    """Write surrogate, costs, frontier and pictures below ``out``, and the presets into the supernet.

    Raises:
        MissingExtraError: the extra ``viz`` is not installed; all but the pictures has been written.
    """
    frontier = found.frontier
    save_surrogate(frontier.surrogate, out / "surrogate.json")
    save_costs([frontier.cost, *found.other_costs], out / "costs.json")
    write_json(out / "frontier.json", frontier_to_json(frontier))
    if supernet is not None:
        write_presets(supernet, found.presets)
    from gearshift.explore import write_frontier_page, write_frontier_png

    write_frontier_page(
        out / "frontier.html",
        frontier,
        found.presets,
        held_out=found.held_out,
        other_costs=found.other_costs,
        provenance=provenance(),
    )
    write_frontier_png(out / "frontier.png", frontier, found.presets)


def frontier_to_json(frontier: Frontier) -> dict[str, Any]:
    """The frontier's points by rising speed-up, and the workload and the data that they are for."""
    return {
        "format": FRONTIER_FORMAT,
        "checkpoint": frontier.surrogate.table.checkpoint,
        "target": str(frontier.surrogate.table.target),
        "context_length": frontier.cost.context_length,
        "batch_size": frontier.cost.batch_size,
        "hardware": frontier.cost.hardware,
        "points": [point.to_json() for point in frontier.points],
        "provenance": provenance(),
    }

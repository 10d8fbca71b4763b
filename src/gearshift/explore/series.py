"""What the pictures draw, as plain numbers: the HTML page and the PNG show the same."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from scipy.stats import norm

from gearshift.placement import Placement
from gearshift.presets import Measurement, Preset
from gearshift.search.cost import CostModel
from gearshift.search.frontier import TEACHER, Frontier
from gearshift.search.table import EvaluationTable

_NINETY_PERCENT = float(norm.ppf(0.95))


@dataclass(frozen=True)
class Dot:
    """A placement in the plane of speed-up and retention.

    Attributes:
        placement: one mixer per layer.
        speed_up: over all-FA; measured for a preset that was, else predicted.
        retention: measured where the placement was evaluated, else predicted.
        low: lower end of the retention's 90% interval; the retention itself where it was measured.
        high: upper end.
        label: a preset's name, else empty.
        measured: which of the two coordinates were measured.
    """

    placement: Placement
    speed_up: float
    retention: float
    low: float
    high: float
    label: str = ""
    measured: str = ""


def frontier_dots(frontier: Frontier) -> list[Dot]:
    """The frontier with the intervals of its predictions, by rising speed-up."""
    retention = frontier.surrogate.retention
    dots = []
    for point in frontier.points:
        reach = _NINETY_PERCENT * point.predicted_std
        low, high = retention(point.predicted - reach), retention(point.predicted + reach)
        dots.append(Dot(point.placement, point.speed_up, point.retention, low, high))
    return dots


def evaluated_dots(frontier: Frontier, table: EvaluationTable) -> list[Dot]:
    """Evaluated placements, with their measured retention and predicted speed-up."""
    dots = []
    for placement, value in zip(table.placements, table.values.tolist(), strict=True):
        kept = frontier.surrogate.retention(value)
        dots.append(Dot(placement, frontier.cost.speed_up(placement), kept, kept, kept, measured="retention"))
    return dots


def preset_dots(frontier: Frontier, presets: Iterable[Preset]) -> list[Dot]:
    """Presets, measured where they were."""
    presets = list(presets)
    predictions = frontier.predict([preset.placement for preset in presets])
    dots = []
    for preset, predicted in zip(presets, predictions, strict=True):
        speed = measurement_for(preset, frontier.cost)
        kept = predicted.retention if preset.retention is None else preset.retention
        known = [("speed-up", speed is not None), ("retention", preset.retention is not None)]
        measured = " and ".join(name for name, there in known if there)
        speed_up = predicted.speed_up if speed is None else speed.speed_up
        dots.append(Dot(preset.placement, speed_up, kept, kept, kept, preset.name, measured))
    return dots


def measurement_for(preset: Preset, cost: CostModel) -> Measurement | None:
    """The preset's measurement at the cost model's context length and batch size, if there is one."""
    for measurement in preset.measurements:
        workload = measurement.workload
        if workload.context_length == cost.context_length and workload.concurrency == cost.batch_size:
            return measurement
    return None


def describe_workload(cost: CostModel) -> str:
    """``context 2,048, batch 1``, or as many sequences as fit."""
    batch = f"batch {cost.batch_size:,}" if cost.batch_size else "as many as fit"
    return f"context {cost.context_length:,}, {batch}"


def summary(frontier: Frontier, presets: Sequence[Preset]) -> str:
    """How much was looked at, and what came of it."""
    space, evaluated = frontier.surrogate.table.space, len(frontier.surrogate.table)
    speeds = ", ".join(
        f"{dot.label} {dot.speed_up:.2f}× at {dot.retention:.0%} of the teacher's quality"
        for dot in preset_dots(frontier, presets)
        if dot.label != TEACHER
    )
    size = f"{space.size:,}" if space.size < 10**9 else f"{space.size:.1e}"
    return (
        f"{space.num_layers} layers with {len(space.mixers)} mixers give {size} placements. "
        f"{evaluated} were evaluated; the frontier has {len(frontier.points)}. "
        f"At {describe_workload(frontier.cost)}: {speeds or 'no placement is faster than the teacher'}."
    )

"""What a cost model is worth: its errors on unseen steps, and those of the published costs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from gearshift.placement import (
    FULL_ATTENTION,
    GATED_DELTA_NET,
    KIMI_DELTA_ATTENTION,
    SLIDING_ATTENTION,
    Placement,
)
from gearshift.search.cost_fit import EngineCost, fit_engine_cost
from gearshift.search.cost_rows import MeasuredStep
from gearshift.search.space import Array

GOOD_MEDIAN, GOOD_WORST = 0.05, 0.15

# One number for each mixer, whatever the context: arXiv 2604.19877, the costs of its two families of presets.
PUBLISHED_COSTS: dict[str, dict[str, float]] = {
    "published Reg": {
        FULL_ATTENTION: 1.0,
        SLIDING_ATTENTION: 0.48,
        KIMI_DELTA_ATTENTION: 0.21,
        GATED_DELTA_NET: 0.14,
    },
    "published Idealized": {
        FULL_ATTENTION: 1.0,
        SLIDING_ATTENTION: 0.16,
        KIMI_DELTA_ATTENTION: 0.11,
        GATED_DELTA_NET: 0.09,
    },
}


@dataclass(frozen=True)
class Errors:
    """Absolute relative errors.

    Attributes:
        rows: how many.
        median: the middle one.
        worst: the largest one.
    """

    rows: int
    median: float
    worst: float

    @classmethod
    def of(cls, relative: Array) -> Errors | None:
        """From signed errors (n,); None if there are none."""
        size = np.abs(relative)
        return cls(len(size), float(np.median(size)), float(size.max())) if len(size) else None

    def __str__(self) -> str:
        return f"median {self.median:.1%}, worst {self.worst:.1%} of {self.rows} measurements"


@dataclass(frozen=True, eq=False)
class SpeedUps:
    """How far predicted speed-ups over all-FA are off.

    Attributes:
        workloads: of each measurement, as `MeasuredStep.workload`.
        relative: signed relative errors (n,) by the name of a cost model.
    """

    workloads: tuple[tuple[int, int | None, int | None], ...]
    relative: Mapping[str, Array]

    def errors(self, workload: tuple[int, int | None, int | None] | None = None) -> dict[str, Errors]:
        """Errors of each cost model, at one workload or at all."""
        kept = np.array([workload in (None, other) for other in self.workloads], dtype=bool)
        found = {name: Errors.of(relative[kept]) for name, relative in self.relative.items()}
        return {name: errors for name, errors in found.items() if errors is not None}

    def to_json(self) -> list[dict[str, Any]]:
        """Errors of each cost model by workload."""
        return [
            {
                "context_length": context,
                "batch_size": batch,
                "memory_bytes": memory,
                "errors": {k: vars(v) for k, v in self.errors((context, batch, memory)).items()},
            }
            for context, batch, memory in dict.fromkeys(self.workloads)
        ]


@dataclass(frozen=True, eq=False)
class CostReport:
    """What a cost model is worth.

    Attributes:
        fitted: errors on the steps it was fitted to.
        left_out: errors on each placement with all its steps left out of the fit; None where every placement
            is needed for it.
        held_out: errors on steps of other placements or workloads, if some were given.
        freedom: measurements beyond the parts in use.
        speed_ups: errors of the speed-up over all-FA on held-out steps, or else on the left-out ones, of this
            model and of the published costs.
    """

    fitted: Errors
    left_out: Errors | None
    held_out: Errors | None
    freedom: int
    speed_ups: SpeedUps

    @property
    def warnings(self) -> list[str]:
        """One sentence for each reason not to trust the model."""
        judged = self.held_out or self.left_out
        told = []
        if judged is None:
            told.append("no placement could be left out: the errors of the fit say little; measure more")
        elif not (judged.median <= GOOD_MEDIAN and judged.worst <= GOOD_WORST):
            told.append(
                f"errors on unseen measurements exceed {GOOD_MEDIAN:.0%} (median) or {GOOD_WORST:.0%} (worst)"
            )
        if self.freedom < 1:
            told.append("as many parts as measurements: there are no error bars")
        return told

    def to_json(self) -> dict[str, Any]:
        """The JSON form."""
        errors = {name: value and vars(value) for name, value in self._errors().items()}
        by_model = {name: vars(value) for name, value in self.speed_ups.errors().items()}
        speed_ups = {"all": by_model, "by_workload": self.speed_ups.to_json()}
        return {**errors, "freedom": self.freedom, "speed_ups": speed_ups}

    def _errors(self) -> dict[str, Errors | None]:
        return {"fitted": self.fitted, "left_out": self.left_out, "held_out": self.held_out}

    def __str__(self) -> str:
        names = {"fitted": "fitted", "left_out": "placements left out in turn", "held_out": "held out"}
        lines = [f"  {names[name]}: {value}" for name, value in self._errors().items() if value]
        lines += [f"  speed-up over the teacher, {k}: {v}" for k, v in self.speed_ups.errors().items()]
        return "\n".join(
            ["cost model, relative errors:", *lines, *(f"  WARNING: {w}" for w in self.warnings)]
        )


def judge_costs(cost: EngineCost, held_out: Sequence[MeasuredStep] = ()) -> CostReport:
    """Say what a cost model is worth.

    Args:
        cost: fitted.
        held_out: measured steps that it was not fitted to.
    """
    left_out, predicted = _leave_out(cost)
    unseen = list(held_out) or left_out
    seconds = _predict(cost, held_out) if held_out else predicted
    return CostReport(
        _required(cost.relative_errors(cost.rows.steps)),
        Errors.of(predicted / _seconds(left_out) - 1),
        Errors.of(_predict(cost, held_out) / _seconds(held_out) - 1),
        cost.decode_fit.freedom,
        _speed_up_errors([*cost.rows.steps, *held_out], unseen, seconds),
    )


def _required(relative: Array) -> Errors:
    errors = Errors.of(relative)
    assert errors is not None, "a cost model has steps"
    return errors


def _seconds(steps: Sequence[MeasuredStep]) -> Array:
    return np.array([step.seconds for step in steps], dtype=np.float64)


def _predict(cost: EngineCost, steps: Sequence[MeasuredStep]) -> Array:
    return cost.decode_fit.predict(cost.decode_features(steps)) if steps else np.empty(0)


def _leave_out(cost: EngineCost) -> tuple[list[MeasuredStep], Array]:
    """Steps, and their seconds as predicted by a fit without their placement, where that is settled."""
    steps: list[MeasuredStep] = []
    predicted = [np.empty(0)]
    for placement in dict.fromkeys(step.placement for step in cost.rows.steps):
        kept = tuple(step for step in cost.rows.steps if step.placement != placement)
        mine = [step for step in cost.rows.steps if step.placement == placement]
        if not kept:
            continue
        fit = fit_engine_cost(replace(cost.rows, steps=kept), cost.seed)
        if fit.decode_fit.settles(fit.decode_features(mine)):
            steps += mine
            predicted.append(_predict(fit, mine))
    return steps, np.concatenate(predicted)


def _speed_up_errors(
    known: Sequence[MeasuredStep], unseen: Sequence[MeasuredStep], seconds: Array
) -> SpeedUps:
    """Errors of speed-ups over all-FA as measured at the same workload, of several cost models.

    Ours takes all-FA's measured seconds for what it speeds up: they are measured wherever a speed-up is.
    """
    teachers = _teacher_tokens(known)
    pairs = [
        (step, each / step.batch_size)
        for step, each in zip(unseen, seconds.tolist(), strict=True)
        if step.workload in teachers and set(step.placement) != {FULL_ATTENTION}
    ]
    if not pairs:
        return SpeedUps((), {})
    workloads = tuple(step.workload for step, _ in pairs)
    measured = np.array([teachers[step.workload] * step.batch_size / step.seconds for step, _ in pairs])
    found = {"this model": np.array([teachers[step.workload] / each for step, each in pairs])}
    for name, costs in PUBLISHED_COSTS.items():
        if all(mixer in costs for step, _ in pairs for mixer in step.placement):
            found[name] = np.array([published_speed_up(step.placement, costs) for step, _ in pairs])
    return SpeedUps(workloads, {name: speed_ups / measured - 1 for name, speed_ups in found.items()})


def _teacher_tokens(steps: Sequence[MeasuredStep]) -> dict[tuple[int, int | None, int | None], float]:
    """All-FA's seconds per token, by workload; of several the median."""
    found: dict[tuple[int, int | None, int | None], list[float]] = {}
    for step in steps:
        if set(step.placement) == {FULL_ATTENTION}:
            found.setdefault(step.workload, []).append(step.seconds / step.batch_size)
    return {workload: float(np.median(seconds)) for workload, seconds in found.items()}


def published_speed_up(placement: Placement, costs: Mapping[str, float]) -> float:
    """Speed-up over all-FA of a placement by costs that do not depend on the workload."""
    return len(placement) * costs[FULL_ATTENTION] / sum(costs[mixer] for mixer in placement)

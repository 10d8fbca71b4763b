"""A small frontier with presets, some of them measured."""

from __future__ import annotations

import math
import random
from dataclasses import dataclass, replace

import pytest

from gearshift.placement import Placement, PlacementSpace
from gearshift.presets import Measurement, Preset
from gearshift.search import (
    CostModel,
    EvaluationTable,
    Frontier,
    build_frontier,
    build_table,
    choose_presets,
    fit_costs,
    fit_surrogate,
)
from gearshift.workload import Workload

HARM = {
    "full_attention": 0.0,
    "sliding_attention": 0.03,
    "gated_delta_net": 0.1,
    "kimi_delta_attention": 0.06,
}
SECONDS = {
    "full_attention": 4e-4,
    "sliding_attention": 2e-4,
    "gated_delta_net": 1e-4,
    "kimi_delta_attention": 1.5e-4,
}


@dataclass(frozen=True)
class Scene:
    """All that a picture is made of."""

    frontier: Frontier
    presets: list[Preset]
    held_out: EvaluationTable
    other_cost: CostModel


def _table(space: PlacementSpace, placements: list[Placement], shuffled: bool = False) -> EvaluationTable:
    losses = [1.5 + sum(HARM[mixer] * (1.5 - layer / 6) for layer, mixer in enumerate(p)) for p in placements]
    if shuffled:
        random.Random(0).shuffle(losses)
    rows = [
        {
            "checkpoint": "abc",
            "data": "held-out",
            "placement": str(placement),
            "loss": loss,
            "quality": math.exp(-loss),
        }
        for placement, loss in zip(placements, losses, strict=True)
    ]
    return build_table(rows, space, "-loss")


def make_scene(shuffled: bool = False) -> Scene:
    """Six layers; with shuffled values the surrogate has nothing to hold on to."""
    space, rng = PlacementSpace(6), random.Random(4)
    drawn = list(
        dict.fromkeys([Placement.uniform("fa", 6), *(space.sample_composition(rng) for _ in range(70))])
    )
    uniform = [Placement.uniform(mixer, 6) for mixer in space.mixers]
    bench = [
        {
            "placement": str(placement),
            "context_length": context,
            "batch_size": 1,
            "seconds_per_step": 1e-3 + sum(SECONDS[mixer] * context / 256 for mixer in placement),
            "hardware": "cpu",
        }
        for placement in uniform
        for context in (256, 2048)
    ]
    costs = fit_costs(bench, space)
    surrogate = fit_surrogate(_table(space, drawn[:45], shuffled), 0, folds=3)
    frontier = build_frontier(surrogate, costs[2048, 1])
    teacher, *others = choose_presets(frontier)
    measured = Measurement(Workload(2048, concurrency=1), 0.01, 1.875, "cpu")
    others[0] = replace(others[0], quality=0.2, retention=0.875, measurements=(measured,))
    return Scene(frontier, [teacher, *others], _table(space, drawn[45:]), costs[256, 1])


@pytest.fixture(scope="session")
def scene() -> Scene:
    return make_scene()


@pytest.fixture(scope="session")
def bad_scene() -> Scene:
    return make_scene(shuffled=True)

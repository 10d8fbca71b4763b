"""A made-up supernet whose true quality and speed are known."""

from __future__ import annotations

import math
import random
from typing import Any

import numpy as np
import pytest

from gearshift.placement import Placement, PlacementSpace
from gearshift.search.space import AdditiveScore

SECONDS = {
    "full_attention": 4e-4,
    "sliding_attention": 2e-4,
    "gated_delta_net": 1e-4,
    "kimi_delta_attention": 1.5e-4,
}


class MadeUp:
    """Minus KL falls additively over layers, neighbours interact, all-FA has 0; full attention is slowest."""

    def __init__(self, layers: int = 12, seed: int = 0, pair_size: float = 0.02) -> None:
        rng = np.random.default_rng(seed)
        harm = np.array([0.0, 0.03, 0.09, 0.07]) * rng.gamma(4.0, 0.25, size=(layers, 4))
        pairs = pair_size * rng.normal(size=(layers - 1, 4, 4))
        pairs[:, 0] = pairs[:, :, 0] = 0.0
        self.space = PlacementSpace(layers)
        self.truth = AdditiveScore(self.space, 0.0, {(0,): -harm, (0, 1): pairs})
        self.uniform = [Placement.uniform(mixer, layers) for mixer in self.space.mixers]

    def draw(self, count: int, seed: int = 0) -> list[Placement]:
        """Distinct placements, all-FA the first."""
        rng = random.Random(seed)
        found = {self.uniform[0]: None}
        while len(found) < count:
            found[self.space.sample_composition(rng)] = None
        return list(found)

    def split(self, fitted: int, held_out: int) -> tuple[list[Placement], list[Placement]]:
        """Two sets of distinct placements without a common one."""
        drawn = self.draw(fitted + held_out)
        return drawn[:fitted], drawn[fitted:]

    def evaluate(self, placements: list[Placement], noise: float = 0.0) -> list[dict[str, Any]]:
        """Evaluation rows; noise stands for what the features cannot say."""
        rng = np.random.default_rng(7)
        losses = 1.5 - self.truth.values(placements) + noise * rng.normal(size=len(placements))
        return [
            {
                "checkpoint": "0123456789abcdef",
                "data": "held-out",
                "placement": str(placement),
                "loss": loss,
                "kl": max(loss - 1.5, 0.0),
                "quality": math.exp(-loss),
                "recall": {"copy": 1 / (1 + loss)},
            }
            for placement, loss in zip(placements, losses.tolist(), strict=True)
        ]

    def bench(
        self, placements: list[Placement], context: int = 256, base: float = 1e-3, noise: float = 0.0
    ) -> list[dict[str, Any]]:
        """Measured decode steps; full attention takes longer with more context."""
        seconds_of = {**SECONDS, "full_attention": SECONDS["full_attention"] * (1 + context / 1024)}
        rng = np.random.default_rng(context)
        return [
            {
                "placement": str(placement),
                "context_length": context,
                "batch_size": 1,
                "seconds_per_step": (base + sum(seconds_of[mixer] for mixer in placement))
                * (1 + noise * rng.normal()),
                "spread": 0.0,
                "hardware": "a processor, 2 cores",
            }
            for placement in placements
        ]


@pytest.fixture(scope="session")
def made_up() -> MadeUp:
    return MadeUp()

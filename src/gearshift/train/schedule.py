"""The learning rate of a step: a pure function, so that a resumed run needs no saved state. No torch."""

from __future__ import annotations

import math
from typing import Literal, Protocol

# The learning rate falls to this share of its largest value.
FINAL_SHARE = 0.1


class Schedule(Protocol):
    """What the learning rate hangs on; a distillation recipe is one."""

    @property
    def steps(self) -> int:
        """Steps in all."""
        ...

    @property
    def warmup_steps(self) -> int:
        """Steps in which it rises."""
        ...

    @property
    def learning_rate(self) -> float:
        """Its largest value."""
        ...

    @property
    def decay(self) -> Literal["cosine", "linear"]:
        """How it falls."""
        ...


def learning_rate(recipe: Schedule, step: int) -> float:
    """The learning rate of ``step``, from 1 to ``recipe.steps``: a linear rise, then a fall to a tenth."""
    if step <= recipe.warmup_steps:
        return recipe.learning_rate * step / recipe.warmup_steps
    passed = (step - recipe.warmup_steps) / (recipe.steps - recipe.warmup_steps)
    remaining = (1 + math.cos(math.pi * passed)) / 2 if recipe.decay == "cosine" else 1 - passed
    return recipe.learning_rate * (FINAL_SHARE + (1 - FINAL_SHARE) * remaining)

"""The learning rate of a step: a pure function, so that a resumed run needs no saved state. No torch."""

from __future__ import annotations

import math
from typing import Literal, Protocol

# The learning rate falls to this share of its largest value.
FINAL_SHARE = 0.1


class Schedule(Protocol):
    """What the learning rate hangs on; a stage of a recipe is one."""

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
    def decay(self) -> Literal["cosine", "linear", "constant"]:
        """How it falls."""
        ...


def learning_rate(stage: Schedule, step: int) -> float:
    """The learning rate of ``step``, from 1 to ``stage.steps``: a linear rise, then a fall to a tenth."""
    if step <= stage.warmup_steps:
        return stage.learning_rate * step / stage.warmup_steps
    passed = (step - stage.warmup_steps) / (stage.steps - stage.warmup_steps)
    remaining = {"cosine": (1 + math.cos(math.pi * passed)) / 2, "linear": 1 - passed, "constant": 1.0}
    return stage.learning_rate * (FINAL_SHARE + (1 - FINAL_SHARE) * remaining[stage.decay])

"""A few hundred steps of one mixer towards the teacher's attention of its layer."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.optim import AdamW

from gearshift.supernet import SequenceContext
from gearshift.supernet.mixers import Mixer
from gearshift.train.calibrate.settings import CalibrationSettings
from gearshift.train.losses import activation_matching
from gearshift.train.schedule import learning_rate

BETAS = (0.9, 0.95)
# Largest norm of the gradient of the relative error: short of it, single batches throw a mixer back.
GRADIENT_CLIP = 0.3
WARMUP_SHARE = 0.1
# How often the mixer is judged on the way, so that the best of several states is kept.
CHECKS = 4
# Steps end early where the error has grown to so many times what it was.
DIVERGED = 2.0

Batch = tuple[Tensor, SequenceContext, Tensor]


@dataclass(frozen=True)
class StepSchedule:
    """A :class:`gearshift.train.schedule.Schedule`: a tenth warm-up, then a cosine down to a tenth."""

    steps: int
    learning_rate: float
    decay: Literal["cosine", "linear"] = "cosine"

    @property
    def warmup_steps(self) -> int:
        """Steps in which the learning rate rises; fewer than ``steps``."""
        return int(self.steps * WARMUP_SHARE)

    @classmethod
    def of(cls, settings: CalibrationSettings, hidden_size: int) -> StepSchedule:
        """The schedule that the settings ask for."""
        return cls(settings.steps, settings.learning_rate or 1 / hidden_size)

    @property
    def checks(self) -> set[int]:
        """The steps after which the mixer is judged; the last is one of them."""
        return {math.ceil(self.steps * check / CHECKS) for check in range(1, CHECKS + 1)}


def take_steps(
    mixer: Mixer,
    schedule: StepSchedule,
    batch: Callable[[int], Batch],
    judge: Callable[[], float],
    start_error: float,
    report: Callable[[int, float], None],
) -> str | None:
    """Train the mixer's weights, all of them, in float32.

    Args:
        mixer: trained in place.
        schedule: how many steps, how large.
        batch: normed inputs, context and targets of a step, from 1.
        judge: called now and then: gives the mixer's error, and remembers the mixer if it is the best so far.
        start_error: its error before the steps.
        report: called after each step with its number and its relative error.

    Returns:
        Why it stopped early, or None.
    """
    mixer.requires_grad_(True)
    optimizer = AdamW(mixer.parameters(), lr=schedule.learning_rate, betas=BETAS, weight_decay=0, fused=True)
    for step in range(1, schedule.steps + 1):
        x_BTD, context, targets_BTD = batch(step)
        optimizer.zero_grad(set_to_none=True)
        loss = activation_matching([mixer(x_BTD, context, None)], [targets_BTD])
        loss.backward()
        norm = nn.utils.clip_grad_norm_(mixer.parameters(), GRADIENT_CLIP)
        if not torch.isfinite(loss + norm):
            return f"step {step} gave an error or a gradient that is not finite"
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(schedule, step)
        optimizer.step()
        report(step, loss.item())
        if step in schedule.checks:
            error = judge()
            if not error <= DIVERGED * start_error:
                return f"after step {step} the error was {error:.3f}"
    return None

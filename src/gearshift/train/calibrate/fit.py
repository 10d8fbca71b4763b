"""One mixer of one layer: each part of the calibration stays only if it brings the mixer nearer."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from gearshift.supernet.mixers import Mixer
from gearshift.train.calibrate.decay import set_time_scales
from gearshift.train.calibrate.ridge import TOKENS_PER_INPUT, fit_output_projection, output_projection
from gearshift.train.calibrate.settings import DECAY, RIDGE, STEPS, CalibrationSettings
from gearshift.train.calibrate.steps import Batch, StepSchedule, take_steps
from gearshift.train.calibrate.walk import Observed
from gearshift.train.calibrate.windows import Windows
from gearshift.train.device import precision
from gearshift.train.losses import activation_matching

# Below this relative error only the rounding of files in bfloat16 is left.
NOTHING_TO_LEARN = 5e-3

Weights = dict[str, Tensor]


@dataclass(frozen=True)
class Material:
    """What the mixers of one layer learn from.

    Attributes:
        layer: counted from zero.
        observed: the teacher's pass.
        windows: the text.
        settings: what to do.
    """

    layer: int
    observed: Observed
    windows: Windows
    settings: CalibrationSettings

    def judging(self) -> Iterator[Batch]:
        """Windows that are never learned from."""
        return self.observed.batches(0, self.windows.judging)

    def learning(self, tokens: int) -> Iterator[Batch]:
        """The first windows to learn from, as many as have so many tokens together."""
        needed = math.ceil(tokens / self.settings.sequence_length)
        first = self.windows.judging
        return self.observed.batches(first, min(first + needed, len(self.windows)))

    def step(self, step: int) -> Batch:
        """What a step learns from, the same for every mixer."""
        return self.observed.batch(torch.from_numpy(self.windows.draw(self.settings, self.layer, step)))


@dataclass
class Fitted:
    """A calibrated mixer.

    Attributes:
        weights: its tensors by their names inside it, in the dtypes they are stored in; those it had before,
            if nothing brought it nearer.
        before: its relative error before.
        after: its relative error with ``weights``, never above ``before``.
        parts: the error after each part that was done, kept or not; after the steps, the least so far.
        notes: what a person should know.
    """

    weights: Weights
    before: float
    after: float
    parts: dict[str, float] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def row(self, layer: int, mixer: str) -> dict[str, Any]:
        """As in ``calibration.jsonl``."""
        parts = {part: round_error(error) for part, error in self.parts.items()}
        return {
            "layer": layer,
            "mixer": mixer,
            "before": round_error(self.before),
            "after": round_error(self.after),
            "parts": parts,
            "notes": self.notes,
        }


def round_error(error: float) -> float | None:
    """Six digits; None for what is no number."""
    return float(f"{error:.6g}") if math.isfinite(error) else None


def fit_mixer(
    mixer: Mixer,
    material: Material,
    dtypes: dict[str, torch.dtype],
    report: Callable[[int, float], None],
) -> Fitted:
    """Bring a mixer nearer to the teacher's attention of its layer.

    Args:
        mixer: in float32, on the device of the material; its weights are changed.
        material: what to learn from.
        dtypes: in what its weights are stored.
        report: called after each step with its number and its relative error.
    """
    with precision(material.observed.device):
        fit = _Fit(mixer, material, dtypes)
        before = fit.judge()
        result = Fitted(fit.best, before, before)
        if before < NOTHING_TO_LEARN:
            result.notes.append("it was near enough")
            return result
        for part, do in ((DECAY, fit.decay), (STEPS, fit.steps), (RIDGE, fit.ridge)):
            if part in material.settings.parts:
                do(result, report)
                fit.take_best()
    result.weights, result.after = fit.best, fit.error
    if result.after == before or not math.isfinite(result.after):
        result.notes.append("nothing brought it nearer, so it stays as it was")
    return result


class _Fit:
    """A mixer, and the best weights it had so far, as they would be stored."""

    def __init__(self, mixer: Mixer, material: Material, dtypes: dict[str, torch.dtype]) -> None:
        self.mixer, self.material, self.dtypes = mixer, material, dtypes
        self.best: Weights = {}
        self.error = math.inf

    @torch.no_grad()
    def judge(self) -> float:
        """The relative error on windows that are never learned from; the best weights are remembered.

        It is the error of the weights as they would be stored, so that rounding cannot make a mixer worse.
        """
        exact = {name: p.detach().clone() for name, p in self.mixer.named_parameters()}
        stored = {name: value.to(self.dtypes[name]) for name, value in exact.items()}
        self._load(stored)
        errors = [
            activation_matching([self.mixer(x, context, None)], [targets]) * len(x)
            for x, context, targets in self.material.judging()
        ]
        self._load(exact)
        error = torch.stack(errors).sum().item() / self.material.windows.judging
        if error < self.error or not self.best:
            self.best = {name: value.cpu() for name, value in stored.items()}
            self.error = error if math.isfinite(error) else math.inf
        return error

    @torch.no_grad()
    def take_best(self) -> None:
        """Go back to the best weights."""
        self._load(self.best)

    def decay(self, result: Fitted, report: Callable[[int, float], None]) -> None:
        """Time scales of decay from the teacher's attention."""
        if set_time_scales(self.mixer, self.material.observed.scales_H):
            result.parts[DECAY] = self.judge()

    def steps(self, result: Fitted, report: Callable[[int, float], None]) -> None:
        """Optimiser steps."""
        settings = self.material.settings
        schedule = StepSchedule.of(settings, self.material.observed.hidden_NTD.shape[-1])
        stopped = take_steps(self.mixer, schedule, self.material.step, self.judge, self.error, report)
        result.parts[STEPS] = self.error
        if stopped:
            result.notes.append(f"its steps ended early: {stopped}; a smaller learning_rate may help")

    def ridge(self, result: Fitted, report: Callable[[int, float], None]) -> None:
        """The output projection in closed form."""
        projection = output_projection(self.mixer)
        if projection is None:
            return
        batches = self.material.learning(TOKENS_PER_INPUT * projection.in_features)
        fit_output_projection(self.mixer, batches, self.material.settings.ridge)
        result.parts[RIDGE] = self.judge()

    def _load(self, weights: Weights) -> None:
        for name, parameter in self.mixer.named_parameters():
            parameter.data.copy_(weights[name])

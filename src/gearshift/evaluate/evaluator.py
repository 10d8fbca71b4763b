"""Scores groups of placements on held-out data, as fast as their passes allow.

Shape letters: B batch, T tokens, V vocabulary, N predicted tokens of all sequences together, A answer places.
"""

from __future__ import annotations

import math
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from gearshift.errors import GearshiftError
from gearshift.evaluate.held_out import EncodedExample, HeldOut
from gearshift.evaluate.prefixes import hidden_states, in_tree_order
from gearshift.evaluate.scores import RecallBatch, loss_and_kl
from gearshift.placement import Placement
from gearshift.supernet import SupernetForCausalLM
from gearshift.train.device import precision
from gearshift.train.losses import TeacherDistribution

# Sequences at a time on a CPU, where more bring nothing.
CPU_BATCH = 8
# On a GPU: of its free memory, and copies of a batch's logits that scoring needs at once (the teacher's
# probabilities, a placement's logits, and room for what is computed of them).
MEMORY_SHARE, LOGIT_COPIES = 0.5, 4
# Passes that the floor is a median of.
FLOOR_PASSES = 5


class EvaluationError(GearshiftError):
    """A placement has no finite loss, or a table cannot be made."""


@dataclass
class Score:
    """What was added up for one placement so far."""

    loss: float = 0.0
    kl: float = 0.0
    tokens: int = 0
    seconds: float = 0.0
    recalled: dict[str, list[bool]] = field(default_factory=lambda: defaultdict(list))


@dataclass
class Speed:
    """How fast an evaluation was.

    Attributes:
        placements: evaluated.
        seconds: that they took in all.
        window_seconds: of these, those spent on windows of text, the teacher's passes included.
        floor_seconds: what the placements' plain forward passes over the windows take, with nothing scored.
    """

    placements: int = 0
    seconds: float = 0.0
    window_seconds: float = 0.0
    floor_seconds: float = 0.0

    @property
    def per_hour(self) -> float:
        """Placements an hour."""
        return 3600 * self.placements / self.seconds if self.seconds else 0.0

    @property
    def floor_fraction(self) -> float:
        """The floor over what the windows took: 1 if scoring were free, more where prefixes are shared."""
        return self.floor_seconds / self.window_seconds if self.window_seconds else 0.0

    def __str__(self) -> str:
        return (
            f"{self.placements} placements evaluated, {self.per_hour:,.0f} an hour; plain forward passes "
            f"take {self.floor_fraction:.2f} of the time"
        )


class Evaluator:
    """Scores groups of placements; each group shares the teacher's pass and the layers that begin alike.

    Args:
        model: on its device.
        held_out: what to score on.
        batch_size: sequences at a time; None for what fits.
    """

    def __init__(self, model: SupernetForCausalLM, held_out: HeldOut, batch_size: int | None = None) -> None:
        self.model = model.eval()
        self.device = next(model.parameters()).device
        length = held_out.windows.shape[1]
        size = batch_size or fitting_batch(self.device, length, int(model.config.vocab_size or 1))
        self.windows = [torch.from_numpy(batch) for batch in held_out.window_batches(size)]
        self.examples = held_out.example_batches(size * length)
        self.speed = Speed()

    @torch.inference_mode()
    def score(self, group: Sequence[Placement], report: Callable[[int], None]) -> dict[Placement, Score]:
        """Score every placement of ``group``; ``report`` is called with how many batches are done.

        Raises:
            EvaluationError: the loss of one of them is not finite.
        """
        scores = {placement: Score() for placement in in_tree_order(group, self.model.placement_space)}
        began = time.perf_counter()
        with precision(self.device):
            for done, windows in enumerate(self.windows, start=1):
                self._score_windows(windows.to(self.device), scores)
                report(done)
            self.speed.window_seconds += time.perf_counter() - began
            for done, examples in enumerate(self.examples, start=len(self.windows) + 1):
                self._score_examples(examples, scores)
                report(done)
        self.speed.seconds += time.perf_counter() - began
        self.speed.placements += len(scores)
        return scores

    def _score_windows(self, windows_BT: Tensor, scores: dict[Placement, Score]) -> None:
        teacher = self.model.placement_space.teacher()
        # In tree order the teacher is the first, so that its layers are shared, too.
        order = list(dict.fromkeys([teacher, *scores]))
        targets_N = windows_BT[:, 1:].flatten()
        distribution = None
        passes = self._logits(windows_BT, order, slice(None, -1))
        for placement, logits_BTV in _timed(passes, scores):
            logits_NV = logits_BTV.flatten(0, 1)
            distribution = distribution or TeacherDistribution.of(logits_NV)
            if placement in scores:
                _add(scores[placement], placement, *loss_and_kl(logits_NV, targets_N, distribution))
                scores[placement].tokens += len(targets_N)

    def _score_examples(self, examples: Sequence[EncodedExample], scores: dict[Placement, Score]) -> None:
        batch = RecallBatch(examples)
        passes = self._logits(batch.ids_BT.to(self.device), list(scores), batch.places_A.to(self.device))
        for placement, logits_BAV in _timed(passes, scores):
            for example, recalls in zip(examples, batch.recalled(logits_BAV), strict=True):
                scores[placement].recalled[example.task].append(recalls)

    def _logits(
        self, ids_BT: Tensor, placements: Sequence[Placement], kept: slice | Tensor
    ) -> Iterator[tuple[Placement, Tensor]]:
        for placement, hidden_BTD in hidden_states(self.model, ids_BT, placements):
            yield placement, self.model.lm_head(hidden_BTD[:, kept])

    @torch.inference_mode()
    def measure_floor(self, placements: Sequence[Placement]) -> None:
        """Time plain forward passes of some placements, and note what all those scored so far would take."""
        windows_BT, times = self.windows[0].to(self.device), []
        with precision(self.device):
            for turn in range(FLOOR_PASSES + 1):
                began = time.perf_counter()
                placement = placements[turn % len(placements)]
                # A number of the result: a GPU has done all of it when that is there.
                self.model(windows_BT, placement=placement, use_cache=False).logits[0, 0, 0].item()
                times.append(time.perf_counter() - began)
        typical = sorted(times[1:])[FLOOR_PASSES // 2]
        batches = sum(len(batch) for batch in self.windows) / len(windows_BT)
        self.speed.floor_seconds = typical * batches * self.speed.placements


def fitting_batch(device: torch.device, tokens: int, vocabulary: int) -> int:
    """Sequences of so many tokens at a time: on a GPU as many as its free memory holds the logits of."""
    if device.type != "cuda":
        return CPU_BATCH
    free, _ = torch.cuda.mem_get_info(device)
    return max(1, int(MEMORY_SHARE * free) // (LOGIT_COPIES * 4 * tokens * vocabulary))


def _timed(
    passes: Iterator[tuple[Placement, Tensor]], scores: dict[Placement, Score]
) -> Iterator[tuple[Placement, Tensor]]:
    """The same passes; each placement's time, its scoring included, is added to its score."""
    while True:
        began = time.perf_counter()
        found = next(passes, None)
        if found is None:
            return
        yield found
        if found[0] in scores:
            scores[found[0]].seconds += time.perf_counter() - began


def _add(score: Score, placement: Placement, loss: float, kl: float) -> None:
    if not math.isfinite(loss + kl):
        raise EvaluationError(
            f"the loss of placement {placement} is not a finite number; its weights are broken: "
            "go back to the last good checkpoint and distil on with a smaller learning_rate"
        )
    score.loss += loss
    score.kl += kl

"""Quality of placements on held-out data: a table that grows row by row and can be resumed.

- ``loss``: mean of -log p(next token), nats a token;
- ``kl``: mean of KL(teacher || placement) of the next token, nats a token;
- ``quality``: exp(-loss), the geometric mean of the likelihood of a token;
- ``retention``: quality over the teacher's quality (all layers on full attention);
- ``recall``: by task, the share of examples whose whole answer is predicted.
"""

from __future__ import annotations

import math
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from gearshift.errors import GearshiftError
from gearshift.evaluate.held_out import EncodedExample, HeldOut, read_held_out
from gearshift.evaluate.scores import loss_and_kl, next_token_logits, recalled
from gearshift.evaluate.table import Row, append_row, read_table, select_rows
from gearshift.files import check_appendable
from gearshift.placement import Placement
from gearshift.progress import show_progress
from gearshift.provenance import provenance
from gearshift.supernet import SupernetForCausalLM, checkpoint_digest, load_supernet
from gearshift.supernet.checkpoint import read_config
from gearshift.train.device import choose_device, precision
from gearshift.train.losses import TeacherDistribution
from gearshift.train.tokens import load_tokenizer

# Placements that share one teacher pass of a batch. Rows are written when a group is done, so a larger group
# saves little and loses more to an interruption.
GROUP = 16


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

    @contextmanager
    def timed(self) -> Iterator[None]:
        """Add the time that the block takes."""
        began = time.perf_counter()
        yield
        self.seconds += time.perf_counter() - began


def evaluate_placements(
    supernet: Path,
    placements: Sequence[Placement],
    data: Path,
    recall: Path | None,
    out: Path,
    *,
    tokens: int = 32768,
    sequence_length: int = 512,
    batch_size: int = 8,
    device: str = "auto",
    progress: bool = True,
) -> list[Row]:
    """Evaluate placements of a supernet and append a row for each to a table.

    Placements that the table already holds for this checkpoint and data are not evaluated again, so an
    interrupted evaluation goes on where it was. All-FA, the measure of retention, is evaluated too if it is
    not there.

    Args:
        supernet: a supernet directory.
        placements: which; equal ones are evaluated once.
        data: held-out documents.
        recall: recall examples, or None for no recall tasks.
        out: the table, a JSON-lines file.
        tokens: how many tokens of ``data`` to use at most.
        sequence_length: tokens that a placement sees at a time.
        batch_size: sequences at a time; recall examples fill the same number of tokens.
        device: ``auto``, ``cpu`` or ``cuda``.
        progress: show a progress bar, or lines where stderr is no terminal.

    Returns:
        The rows of ``placements``, in their order.

    Raises:
        PlacementError: a placement does not fit the supernet, or the supernet lacks its teacher.
        EvaluationError: a placement's loss is not finite; the rows before it are in the table.
        GearshiftError: supernet, data, examples or table are missing or damaged.
    """
    space = read_config(supernet).placement_space
    check_appendable(out)
    teacher = space.teacher()
    wanted = [space.check(placement) for placement in (teacher, *placements)]
    held_out = read_held_out(
        data, recall, load_tokenizer(supernet), tokens=tokens, sequence_length=sequence_length
    )
    table = _Table(out, checkpoint_digest(supernet), held_out.name, teacher)
    missing = [placement for placement in dict.fromkeys(wanted) if placement not in table.rows]
    if missing:
        model = load_supernet(supernet, device=choose_device(device))
        _fill(table, Evaluator(model, held_out, batch_size), missing, progress)
    return [table.rows[placement] for placement in wanted[1:]]


class Evaluator:
    """Scores groups of placements on held-out data; the teacher runs once for each batch of a group."""

    def __init__(self, model: SupernetForCausalLM, held_out: HeldOut, batch_size: int) -> None:
        self.model = model.eval()
        self.device = next(model.parameters()).device
        self.windows = [torch.from_numpy(batch) for batch in held_out.window_batches(batch_size)]
        self.examples = held_out.example_batches(batch_size * held_out.windows.shape[1])

    @torch.inference_mode()
    def score(self, group: Sequence[Placement], report: Callable[[int], None]) -> dict[Placement, Score]:
        """Score every placement of ``group``; ``report`` is called with how many batches are done.

        Raises:
            EvaluationError: the loss of one of them is not finite.
        """
        scores = {placement: Score() for placement in group}
        with precision(self.device):
            for done, windows in enumerate(self.windows, start=1):
                self._score_windows(windows.to(self.device), scores)
                report(done)
            for done, examples in enumerate(self.examples, start=len(self.windows) + 1):
                self._score_examples(examples, scores)
                report(done)
        return scores

    def _score_windows(self, windows_BT: Tensor, scores: dict[Placement, Score]) -> None:
        everywhere = self.model.placement_space.teacher()
        teacher = TeacherDistribution.of(next_token_logits(self.model, windows_BT, everywhere))
        targets_N = windows_BT[:, 1:].flatten()
        for placement, score in scores.items():
            with score.timed():
                loss, kl = loss_and_kl(
                    next_token_logits(self.model, windows_BT, placement), targets_N, teacher
                )
            if not math.isfinite(loss + kl):
                raise EvaluationError(
                    f"the loss of placement {placement} is not a finite number; its weights are broken: "
                    "go back to the last good checkpoint and distil on with a smaller learning_rate"
                )
            score.loss += loss
            score.kl += kl
            score.tokens += len(targets_N)

    def _score_examples(self, examples: Sequence[EncodedExample], scores: dict[Placement, Score]) -> None:
        for placement, score in scores.items():
            with score.timed():
                right = recalled(self.model, examples, placement, self.device)
            for example, recalls in zip(examples, right, strict=True):
                score.recalled[example.task].append(recalls)


class _Table:
    """The rows of one checkpoint on one set of data, on the disk and by placement."""

    def __init__(self, path: Path, checkpoint: str, data: str, teacher: Placement) -> None:
        self.path = path
        self.origin = {"checkpoint": checkpoint, "data": data}
        self.teacher = teacher
        self.rows = select_rows(read_table(path), checkpoint, data)

    def add(self, placement: Placement, score: Score) -> None:
        """Append a row; that of the teacher comes first, since every retention refers to it."""
        loss = score.loss / score.tokens
        teacher_loss = loss if placement == self.teacher else self.rows[self.teacher]["loss"]
        row = self.origin | {
            "placement": str(placement),
            "loss": loss,
            "kl": max(score.kl / score.tokens, 0.0),  # rounding can take a divergence of zero below it
            "recall": {task: sum(hits) / len(hits) for task, hits in sorted(score.recalled.items())},
            "quality": math.exp(-loss),
            "retention": math.exp(teacher_loss - loss),
            "tokens": score.tokens,
            "seconds": round(score.seconds, 3),
            "provenance": provenance(),
        }
        append_row(self.path, row)
        self.rows[placement] = row


def _fill(table: _Table, evaluator: Evaluator, missing: Sequence[Placement], progress: bool) -> None:
    """Evaluate the missing placements group by group; a group's rows are written when it is done."""
    parts = len(evaluator.windows) + len(evaluator.examples)
    with show_progress("evaluate", len(missing), enabled=progress) as report:
        for start in range(0, len(missing), GROUP):
            group = missing[start : start + GROUP]

            def batch_done(done: int, start: int = start, size: int = len(group)) -> None:
                report(start + size * done // parts, f"batch {done}/{parts}")

            for placement, score in evaluator.score(group, batch_done).items():
                table.add(placement, score)

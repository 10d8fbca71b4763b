"""Quality of placements on held-out data: a table that grows row by row and can be resumed.

- ``loss``: mean of -log p(next token), nats a token;
- ``kl``: mean of KL(teacher || placement) of the next token, nats a token;
- ``quality``: exp(-loss), the geometric mean of the likelihood of a token;
- ``retention``: quality over the teacher's quality (all layers on full attention);
- ``recall``: by task, the share of examples whose whole answer is predicted.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path

from gearshift.evaluate.evaluator import Evaluator, Score, Speed
from gearshift.evaluate.held_out import read_held_out
from gearshift.evaluate.prefixes import in_tree_order
from gearshift.evaluate.shard import Shard
from gearshift.evaluate.table import Row, append_row, read_table, select_rows
from gearshift.files import check_appendable
from gearshift.placement import Placement
from gearshift.progress import show_progress
from gearshift.provenance import provenance
from gearshift.supernet import checkpoint_digest, load_supernet
from gearshift.supernet.checkpoint import read_config
from gearshift.train.device import choose_device
from gearshift.train.tokens import load_tokenizer

# Placements that share one teacher pass of a batch and the layers that they begin alike. Rows are written
# when a group is done: groups grow while they take less than so many seconds; an interruption loses one.
GROUP, LARGEST_GROUP = 16, 256
GROUP_SECONDS = 20.0


def evaluate_placements(
    supernet: Path,
    placements: Sequence[Placement],
    data: Path,
    recall: Path | None,
    out: Path,
    *,
    tokens: int = 32768,
    sequence_length: int = 512,
    batch_size: int | None = None,
    device: str = "auto",
    shard: Shard | None = None,
    tell_speed: Callable[[Speed], None] | None = None,
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
        batch_size: sequences at a time; recall examples fill the same number of tokens. None for what fits.
        device: ``auto``, ``cpu`` or ``cuda``.
        shard: evaluate a part of the placements only. Every shard evaluates all-FA.
        tell_speed: called at the end with how fast it was, unless all rows were there already.
        progress: show a progress bar, or lines where stderr is no terminal.

    Returns:
        The rows of ``placements``, in their order; of a shard, those of its part.

    Raises:
        PlacementError: a placement does not fit the supernet, or the supernet lacks its teacher.
        EvaluationError: a placement's loss is not finite; the rows before it are in the table.
        GearshiftError: supernet, data, examples or table are missing or damaged.
    """
    space = read_config(supernet).placement_space
    check_appendable(out)
    teacher = space.teacher()
    asked = list(dict.fromkeys(space.check(placement) for placement in placements))
    if shard is not None:
        asked = shard.part(in_tree_order(asked, space))
    held_out = read_held_out(
        data, recall, load_tokenizer(supernet), tokens=tokens, sequence_length=sequence_length
    )
    table = _Table(out, checkpoint_digest(supernet), held_out.name, teacher)
    missing = [placement for placement in dict.fromkeys([teacher, *asked]) if placement not in table.rows]
    if missing:
        model = load_supernet(supernet, device=choose_device(device))
        evaluator = Evaluator(model, held_out, batch_size)
        _fill(table, evaluator, missing, progress)
        if tell_speed is not None:
            evaluator.measure_floor(missing)
            tell_speed(evaluator.speed)
    wanted = asked if shard is not None else placements
    return [table.rows[placement] for placement in wanted]


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
    """Evaluate the missing placements group by group; a group's rows are written when it is done.

    Groups are neighbours in the tree; within a group rows come in the order of ``missing``.
    """
    parts, start = len(evaluator.windows) + len(evaluator.examples), 0
    order = in_tree_order(missing, evaluator.model.placement_space)
    place = {placement: number for number, placement in enumerate(missing)}
    with show_progress("evaluate", len(order), enabled=progress) as report:
        while start < len(order):
            group = order[start : start + _group_size(evaluator.speed)]

            def batch_done(done: int, start: int = start, size: int = len(group)) -> None:
                report(start + size * done // parts, f"batch {done}/{parts}")

            scores = evaluator.score(group, batch_done)
            for placement in sorted(scores, key=place.__getitem__):
                table.add(placement, scores[placement])
            start += len(group)


def _group_size(speed: Speed) -> int:
    """The next group's: the first is small, the others take some seconds each."""
    if not speed.placements:
        return GROUP
    each = speed.seconds / speed.placements
    return max(GROUP, min(LARGEST_GROUP, int(GROUP_SECONDS / each)))

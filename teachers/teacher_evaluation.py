"""What the teacher is measured by while it trains: held-out loss and recall accuracy."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass

import torch
from teacher_training import logits_of, next_token_loss
from torch import Tensor
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from gearshift.evaluate.recall import RecallExample, encode_example, make_examples

_ROWS_AT_ONCE = 32
_LENGTHS = (300, 800, 1600, 2800)


@dataclass(frozen=True)
class RecallRow:
    """An example as token ids, and the cell of the report (``task@characters``) it counts for."""

    cell: str
    prompt: list[int]
    answer: list[int]


def recall_rows(
    tokenizer: PreTrainedTokenizerFast,
    count: int,
    context: int,
    seed: int,
    lengths: tuple[int, ...] = _LENGTHS,
) -> list[RecallRow]:
    """Fixed examples of every task and length that fit into the context."""
    rows = []
    for size in lengths:
        for example in make_examples(count, seed, (size,)):
            rows.append(_encoded(tokenizer, example, size))
    return [row for row in rows if len(row.prompt) + len(row.answer) <= context]


def _encoded(tokenizer: PreTrainedTokenizerFast, example: RecallExample, size: int) -> RecallRow:
    prompt, answer = encode_example(lambda text: tokenizer.encode(text, add_special_tokens=False), example)
    return RecallRow(f"{example.task}@{size}", prompt, answer)


@torch.no_grad()
def held_out_loss(model: LlamaForCausalLM, rows: Tensor, precision: Callable[[], torch.autocast]) -> float:
    """Mean loss (nats a token) of held-out rows (batch, time + 1)."""
    losses = []
    for part in rows.split(_ROWS_AT_ONCE):
        with precision():
            losses.append(next_token_loss(model, part).item() * len(part))
    return sum(losses) / len(rows)


@torch.no_grad()
def recall_accuracy(
    model: LlamaForCausalLM, rows: list[RecallRow], precision: Callable[[], torch.autocast]
) -> dict[str, float]:
    """Share of examples per cell whose every answer token is the likeliest one."""
    right: dict[str, list[bool]] = defaultdict(list)
    ordered = sorted(rows, key=lambda row: len(row.prompt))
    for first in range(0, len(ordered), _ROWS_AT_ONCE):
        part = ordered[first : first + _ROWS_AT_ONCE]
        with precision():
            best = logits_of(model, _padded(part, model.device)).argmax(-1).cpu()
        for row, line in zip(part, best, strict=True):
            start = len(row.prompt) - 1
            right[row.cell].append(line[start : start + len(row.answer)].tolist() == row.answer)
    return {cell: sum(marks) / len(marks) for cell, marks in sorted(right.items())}


def _padded(rows: list[RecallRow], device: torch.device) -> Tensor:
    """Token ids (rows, longest row), filled up on the right; causal attention never sees the filling."""
    longest = max(len(row.prompt) + len(row.answer) for row in rows)
    ids = torch.zeros((len(rows), longest), dtype=torch.int64)
    for line, row in zip(ids, rows, strict=True):
        both = row.prompt + row.answer
        line[: len(both)] = torch.tensor(both)
    return ids.to(device)

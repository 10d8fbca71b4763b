"""What tests of training share."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from gearshift.files import read_json_lines
from gearshift.supernet import load_supernet
from gearshift.train.packing import Batch, make_batch

# Everything of a row that must repeat bit for bit.
REPEATED = (
    "step",
    "stage",
    "loss",
    "gradient_norm",
    "learning_rate",
    "tokens",
    "placements",
    "mixers",
    "layers",
)


def rows(root: Path) -> list[dict]:
    return read_json_lines(root / "metrics.jsonl")


def losses(root: Path) -> list[tuple]:
    return [tuple(str(row[key]) for key in REPEATED) for row in rows(root)]


def same_weights(first: Path, second: Path) -> bool:
    one, other = (load_supernet(root / "supernet").state_dict() for root in (first, second))
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def grad(tensor: torch.Tensor) -> torch.Tensor:
    """The gradient that a tensor must have by now."""
    assert tensor.grad is not None
    return tensor.grad


def random_batch(rows: int = 2, length: int = 24, seed: int = 0, lengths: Sequence[int] = ()) -> Batch:
    """Random tokens; with ``lengths`` every row holds documents of these lengths, kept apart."""
    rng = np.random.default_rng(seed)
    cut = list(lengths) or [length]
    made = [(rng.integers(1, 257, length), np.ones(length, dtype=bool), cut) for _ in range(rows)]
    return make_batch(made, apart=bool(lengths))

"""What is told of a step: its row of ``metrics.jsonl``, and a line for people."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import torch

from gearshift.memory import peak_resident_memory
from gearshift.placement import Placement, short_name
from gearshift.train.distributed import Group
from gearshift.train.flops import Flops, Sizes
from gearshift.train.recipe import Recipe
from gearshift.train.trainer import StepResult

Row = dict[str, Any]


class Rows:
    """Makes a row of every step.

    Args:
        recipe: what is done.
        sizes: of the supernet.
        group: the processes.
    """

    def __init__(self, recipe: Recipe, sizes: Sizes, group: Group) -> None:
        self.recipe, self.group = recipe, group
        self.flops = [Flops(sizes, stage.sequence_length) for stage in recipe.stages]

    def row(self, result: StepResult, tokens: int, seconds: float) -> Row:
        """The row of a step.

        Args:
            result: what it did.
            tokens: read so far, by the whole run.
            seconds: that it took.
        """
        fields = asdict(result)
        terms = fields.pop("terms")
        speed = {"tokens_per_second": round(result.tokens / seconds, 1), "seconds": round(seconds, 4)}
        placements = [Placement.parse(text) for text in result.placements]
        drawn: Counter[str] = Counter()
        for placement, times in zip(placements, result.placements.values(), strict=True):
            drawn.update({short_name(name): times * count for name, count in placement.counts().items()})
        used = {"mfu": self._mfu(result, placements, seconds), "memory_bytes": peak_memory(self.group.device)}
        return {**fields, **terms, "tokens": tokens, **speed, **used, "layers_drawn": dict(drawn)}

    def _mfu(self, result: StepResult, placements: Sequence[Placement], seconds: float) -> float | None:
        """The share of what the GPUs can do that went into useful products; None on a CPU."""
        if self.group.device.type != "cuda":
            return None
        index, _ = self.recipe.stage_of(result.step)
        attention = self.recipe.trained != "mixers"
        each = self.flops[index].step(self.recipe.stages[index], map(list, placements), attention)
        possible = seconds * self.group.ranks * self.recipe.cluster.tflops * 1e12
        return round(result.tokens * each / possible, 4)


def peak_memory(device: torch.device) -> int:
    """Most bytes that this process has held: of the GPU's memory, or of main memory."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return peak_resident_memory()


def note(row: Row) -> str:
    """A short line of a row, for people."""
    parts = [row["stage"]]
    if row.get("loss") is not None:
        parts.append(f"loss {row['loss']:.3f}")
    parts.append(f"{row['tokens_per_second']:,.0f} tokens/s")
    if row.get("mfu") is not None:
        parts.append(f"MFU {row['mfu']:.0%}")
    return "  ".join(parts)

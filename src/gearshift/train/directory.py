"""A run directory: where it keeps what, and whether a recipe may go on in it. No torch."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class RunDirectory:
    """Where a run keeps what."""

    root: Path

    @property
    def recipe(self) -> Path:
        """The recipe with every value spelled out."""
        return self.root / "recipe.yaml"

    @property
    def provenance(self) -> Path:
        """Where the run's numbers come from."""
        return self.root / "provenance.json"

    @property
    def metrics(self) -> Path:
        """One JSON line a step."""
        return self.root / "metrics.jsonl"

    @property
    def checkpoint(self) -> Path:
        """The latest training states."""
        return self.root / "checkpoint"

    @property
    def supernet(self) -> Path:
        """The result; it is there only when the run has finished."""
        return self.root / "supernet"

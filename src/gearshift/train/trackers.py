"""Trackers of experiments that are installed: each gets every number of every row of ``metrics.jsonl``."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from gearshift.train.metrics import Tracker, TrackerError
from gearshift.train.recipe import Recipe

PROJECT = "gearshift"


class RunTracker:
    """trackio or wandb, whose Python interfaces are the same.

    Args:
        name: which.
        recipe: told to it.
    """

    def __init__(self, name: str, recipe: Recipe) -> None:
        self._library = _library(name)
        self._library.init(project=PROJECT, name=recipe.out.name, config=recipe.model_dump(mode="json"))

    def log(self, numbers: Mapping[str, float], step: int) -> None:
        """See :class:`gearshift.train.metrics.Tracker`."""
        self._library.log(dict(numbers), step=step)

    def close(self) -> None:
        """See :class:`gearshift.train.metrics.Tracker`."""
        self._library.finish()


class TensorboardTracker:
    """Event files of TensorBoard.

    Args:
        folder: where they go.
    """

    def __init__(self, folder: Path) -> None:
        _library("tensorboard")
        self._writer = importlib.import_module("torch.utils.tensorboard").SummaryWriter(folder)

    def log(self, numbers: Mapping[str, float], step: int) -> None:
        """See :class:`gearshift.train.metrics.Tracker`."""
        for name, value in numbers.items():
            self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        """See :class:`gearshift.train.metrics.Tracker`."""
        self._writer.close()


def open_trackers(recipe: Recipe, root: Path) -> list[Tracker]:
    """The trackers that a recipe asks for.

    Raises:
        TrackerError: one is not installed.
    """
    return [
        TensorboardTracker(root / "tensorboard") if name == "tensorboard" else RunTracker(name, recipe)
        for name in recipe.trackers
    ]


def check_trackers(recipe: Recipe) -> None:
    """Refuse trackers that are not installed, before anything starts.

    Raises:
        TrackerError: one is not.
    """
    for name in recipe.trackers:
        _library(name)


def _library(name: str) -> Any:  # noqa: ANN401 - a module
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise TrackerError(
            f"trackers has {name!r}, which cannot be imported ({error}); pip install {name}, or leave it "
            "out: metrics.jsonl is written in any case"
        ) from None

"""Going on with a run: which of its states is whole, and whether it belongs to what is given now."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch

from gearshift.errors import OutputExistsError
from gearshift.train.checkpoint import (
    TrainingState,
    TrainingStateError,
    check_parts,
    load_data_state,
    load_training_tensors,
    read_training_state,
    training_states,
)
from gearshift.train.directory import RunDirectory
from gearshift.train.distributed import Group
from gearshift.train.recipe import Recipe
from gearshift.train.recipe_file import describe_changes
from gearshift.train.setup import RunError
from gearshift.train.trainer import Trainer


def refuse_other_run(directory: RunDirectory, recipe: Recipe, resume: bool) -> None:
    """What is there is this recipe's and is to be gone on with; checked before anything is loaded.

    Raises:
        OutputExistsError: there is something, and ``resume`` is false.
        RunError: a state was made with another recipe.
    """
    root = directory.root
    if not resume and root.exists() and (root.is_file() or any(root.iterdir())):
        raise OutputExistsError(
            f"the run directory {root} already exists; go on with --resume, or give another 'out'"
        )
    for path in training_states(directory.checkpoint):
        try:
            state = read_training_state(path)
        except TrainingStateError:
            continue  # a damaged one is told of, and passed over, when one is loaded
        changes = describe_changes(Recipe.model_validate(state.recipe), recipe)
        if changes:
            raise RunError(
                f"{path} was made with another recipe ({'; '.join(changes)}); "
                f"resume with {directory.recipe}, or give another 'out'"
            )


def load_latest(
    folder: Path, fresh: TrainingState, trainer: Trainer, group: Group
) -> tuple[TrainingState, dict[str, Any] | None]:
    """Go to the newest state that is whole; every process has to take part.

    Args:
        folder: the run's checkpoint folder.
        fresh: the state of a run that starts now, with the inputs as they are.
        trainer: gets weights and moments.
        group: the processes.

    Returns:
        How far the run is, and where the data stood; ``fresh`` and None if there is no state.

    Raises:
        TrainingStateError: there are states, but none is whole.
        RunError: the newest belongs to another supernet or other data.
    """
    paths, problem = training_states(folder), None
    for path in paths:
        problem = _problem(path, group)
        if problem is None:
            state = read_training_state(path)
            _refuse_other_inputs(path, state, fresh)
            load_training_tensors(path, state, trainer.trained, trainer.optimizer, group)
            return TrainingState(state.step, state.tokens, fresh.recipe, fresh.supernet, fresh.data), (
                load_data_state(path, state)
            )
        if group.first:
            print(f"this checkpoint is passed over: {problem}", file=sys.stderr, flush=True)
    if paths:
        raise TrainingStateError(
            f"no checkpoint in {folder} is whole ({problem}); restore one, or remove the run directory "
            "and start again"
        )
    return fresh, None


def _problem(path: Path, group: Group) -> str | None:
    """Why a state cannot be used; all processes agree whether it can."""
    try:
        problem = check_parts(path, read_training_state(path), group)
    except TrainingStateError as error:
        problem = str(error)
    broken = torch.tensor(float(problem is not None), device=group.device)
    if group.add_up(broken).item():
        return problem or f"{path}: another process found it damaged"
    return None


def _refuse_other_inputs(path: Path, state: TrainingState, fresh: TrainingState) -> None:
    for what in ("supernet", "data"):
        before, now = getattr(state, what), getattr(fresh, what)
        if before != now:
            raise RunError(
                f"{path} was made with another {what} (digest {before}, now {now}); "
                "resume with what the run started from, or give another 'out'"
            )

"""The state of a training run on disk: trained weights, AdamW's moments, and how far the run was.

A run's ``checkpoint`` folder holds ``step-00000200/{training.safetensors, state.json}``. A new state is
written under a temporary name, forced to the disk and renamed, and only then is the one before it removed: at
every moment the newest ``step-`` folder is complete.
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from gearshift._checks import check_keys, is_count
from gearshift.errors import GearshiftError
from gearshift.files import atomic_directory, read_json, write_json

FORMAT = "gearshift-training-1"
MOMENTS = ("exp_avg", "exp_avg_sq", "step")

_STEP_FOLDER = re.compile(r"step-(\d{8,})")


class TrainingStateError(GearshiftError):
    """A training state cannot be written, or what was found is damaged or belongs to another run."""


@dataclass(frozen=True)
class TrainingState:
    """How far a run was, and what it was made from.

    Attributes:
        step: optimiser steps taken.
        tokens: training tokens read so far.
        recipe: the recipe's values.
        supernet: digest of the supernet directory that the run started from.
        data: digest of the training tokens.
        format: the version of this file.
    """

    step: int
    tokens: int
    recipe: dict[str, Any]
    supernet: str
    data: str
    format: str = FORMAT


def save_training_state(
    folder: Path, state: TrainingState, trained: Mapping[str, Tensor], optimizer: torch.optim.Optimizer
) -> Path:
    """Write a state below ``folder`` and then remove older ones; return the new state's directory.

    Args:
        folder: the run's checkpoint folder.
        state: how far the run is.
        trained: the trained parameters by name.
        optimizer: the AdamW that holds their moments; parameters that never had a gradient have none.

    Raises:
        TrainingStateError: it cannot be written, for example because the disk is full; older states stay.
    """
    path = folder / f"step-{state.step:08d}"
    try:
        with atomic_directory(path, overwrite=True) as partial:
            save_file(_to_tensors(trained, optimizer), partial / "training.safetensors")
            write_json(partial / "state.json", asdict(state))
            for file in partial.iterdir():
                _force_to_disk(file)
    except (OSError, SafetensorError) as error:
        raise TrainingStateError(_not_written(path, error)) from error
    _remove_all_but(path)
    return path


def latest_training_state(folder: Path) -> Path | None:
    """The directory of the newest complete state below ``folder``, or None."""
    paths = list(folder.iterdir()) if folder.is_dir() else []
    return max((path for path in paths if _STEP_FOLDER.fullmatch(path.name)), key=_step_of, default=None)


def read_training_state(path: Path) -> TrainingState:
    """Read how far a state's run was, without its tensors.

    Raises:
        TrainingStateError: it is missing, damaged or of another kind.
    """
    file = path / "state.json"
    values = check_keys(TrainingState, read_json(file), str(file), TrainingStateError)
    if values.get("format") != FORMAT:
        raise TrainingStateError(f"{file}: the format is {values.get('format')!r}; expected {FORMAT!r}")
    if not is_count(values["step"], 0) or not is_count(values["tokens"], 0):
        raise TrainingStateError(
            f"{file}: step is {values['step']!r}, tokens {values['tokens']!r}; expected whole numbers"
        )
    return TrainingState(**values)


def load_training_tensors(
    path: Path, trained: Mapping[str, Tensor], optimizer: torch.optim.Optimizer
) -> None:
    """Read a state's weights and moments into place; nothing is changed unless all of them fit.

    Raises:
        TrainingStateError: the file is missing or damaged, or names or shapes are not those of ``trained``.
    """
    tensors = _read_tensors(path / "training.safetensors")
    _check_tensors(tensors, trained, path)
    with torch.no_grad():
        for name, parameter in trained.items():
            parameter.copy_(tensors[f"weight/{name}"])
            if f"step/{name}" in tensors:
                optimizer.state[parameter] = _moments(tensors, name, parameter)


def _to_tensors(trained: Mapping[str, Tensor], optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    tensors = {f"weight/{name}": parameter.detach().contiguous() for name, parameter in trained.items()}
    for name, parameter in trained.items():
        for key, value in optimizer.state.get(parameter, {}).items():
            tensors[f"{key}/{name}"] = value.contiguous()
    return tensors


def _moments(tensors: Mapping[str, Tensor], name: str, parameter: Tensor) -> dict[str, Tensor]:
    """AdamW's entry for one parameter, on its device: the fused kernel wants the step counter there too."""
    return {key: tensors[f"{key}/{name}"].to(parameter.device) for key in MOMENTS}


def _read_tensors(path: Path) -> dict[str, Tensor]:
    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise TrainingStateError(
            f"{path} cannot be read ({error}): it is missing, cut short or of another kind; "
            "restore it, or remove the run directory and start again"
        ) from None


def _check_tensors(tensors: Mapping[str, Tensor], trained: Mapping[str, Tensor], path: Path) -> None:
    """Every weight is there; a parameter has all its moments or none; shapes agree; nothing is left over."""
    moved = {name.removeprefix("step/") for name in tensors if name.startswith("step/")} & trained.keys()
    expected = {f"weight/{name}": parameter.shape for name, parameter in trained.items()}
    for name in moved:
        expected |= {f"{key}/{name}": trained[name].shape for key in ("exp_avg", "exp_avg_sq")}
        expected[f"step/{name}"] = torch.Size([])
    if missing := sorted(expected.keys() - tensors.keys()):
        raise TrainingStateError(_foreign(path, f"lacks {missing[0]!r} and {len(missing) - 1} more"))
    if surplus := sorted(tensors.keys() - expected.keys()):
        raise TrainingStateError(
            _foreign(path, f"holds {surplus[0]!r} and {len(surplus) - 1} more that are not trained")
        )
    for name, shape in expected.items():
        if tensors[name].shape != shape:
            found, wanted = tuple(tensors[name].shape), tuple(shape)
            raise TrainingStateError(_foreign(path, f"holds {name!r} of shape {found}, expected {wanted}"))


def _foreign(path: Path, what: str) -> str:
    return f"{path} is not a state of this run: it {what}; resume with the supernet that the run started from"


def _not_written(path: Path, error: Exception) -> str:
    older = latest_training_state(path.parent)
    kept = f"the last good one, {older}, is intact" if older else "there is none before it"
    return (
        f"the checkpoint {path} could not be written ({error}); {kept}: "
        "free some space, or mend what is wrong, and run the same command again with --resume"
    )


def _force_to_disk(path: Path) -> None:
    """Without this a power cut after the rename could leave empty files under a good name."""
    with path.open("rb") as file:
        os.fsync(file.fileno())


def _remove_all_but(kept: Path) -> None:
    """Remove older states and what a killed process left half-written."""
    for path in kept.parent.iterdir():
        if path != kept and (_STEP_FOLDER.fullmatch(path.name) or path.name.endswith(".partial")):
            shutil.rmtree(path, ignore_errors=True)


def _step_of(path: Path) -> int:
    match = _STEP_FOLDER.fullmatch(path.name)
    assert match is not None
    return int(match[1])

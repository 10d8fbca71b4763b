"""The state of a training run on disk: trained weights, AdamW's moments, the data's place, how far it is.

A run's ``checkpoint`` folder holds ``step-00000200/``, in which every process has written its own part:
``rank-00003.safetensors``, and ``rank-00003.json`` that says which rows of which tensor those are. Any number
of processes can read it. A new state is written in the background under a temporary name, forced to the disk
and renamed, and only then are older ones removed: at every moment each ``step-`` folder is complete. Nothing
is pickled.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from gearshift._checks import check_keys, is_count
from gearshift.errors import FileFormatError, GearshiftError
from gearshift.files import read_json, write_json
from gearshift.train.distributed import Group, local

FORMAT = "gearshift-training-2"
MOMENTS = ("exp_avg", "exp_avg_sq")
PARTIAL = ".partial"

_STEP_FOLDER = re.compile(r"step-(\d{8,})")


class TrainingStateError(GearshiftError):
    """A training state cannot be written, or what was found is damaged or belongs to another run."""


@dataclass(frozen=True)
class TrainingState:
    """How far a run was, and what it was made from.

    Attributes:
        step: steps taken.
        tokens: training tokens read so far.
        recipe: the recipe's values.
        supernet: digest of the supernet directory that the run started from.
        data: digests of the documents, by stage.
        ranks: how many processes wrote it.
        format: the version of this file.
    """

    step: int
    tokens: int
    recipe: dict[str, Any]
    supernet: str
    data: list[str]
    ranks: int = 1
    format: str = FORMAT


class Saver:
    """Writes states in the background; every process calls the same methods in the same order.

    Args:
        folder: the run's checkpoint folder.
        group: the processes.
        keep: how many states stay.
    """

    def __init__(self, folder: Path, group: Group, keep: int = 2) -> None:
        self.folder, self.group, self.keep = folder, group, keep
        self._pool = ThreadPoolExecutor(1, "checkpoint")
        self._writing: tuple[TrainingState, Future[None]] | None = None

    def save(
        self,
        state: TrainingState,
        trained: Mapping[str, Tensor],
        optimizer: torch.optim.Optimizer,
        data: Mapping[str, Any],
    ) -> None:
        """Copy a state and begin to write it; one that is still being written is finished first.

        Args:
            state: how far the run is.
            trained: the trained parameters by name.
            optimizer: the AdamW that holds their moments; parameters that never had a gradient have none.
            data: where this process's part of the data stands, by lane.

        Raises:
            TrainingStateError: the one before it could not be written, for example because the disk is full.
        """
        self.finish()
        state = replace(state, ranks=self.group.ranks)
        partial = self._partial(state)
        if self.group.first:
            shutil.rmtree(partial, ignore_errors=True)
            _make_folder(partial)
        self.group.wait()
        tensors = {key: value.detach().cpu().clone() for key, value in _own_tensors(trained, optimizer)}
        parts = {"parts": _own_rows(trained, self.group), "lanes": dict(data)}
        writing = self._pool.submit(_write_part, partial, self.group.rank, tensors, parts)
        self._writing = (state, writing)

    def poll(self) -> None:
        """Give a state its name if every process has written its part.

        Raises:
            TrainingStateError: one could not.
        """
        if self._writing is None:
            return
        state, writing = self._writing
        failed = writing.done() and writing.exception() is not None
        counts = torch.tensor([writing.done(), failed], dtype=torch.float32, device=self.group.device)
        done, failures = self.group.add_up(counts).tolist()
        if failures:
            self._writing = None
            shutil.rmtree(self._partial(state), ignore_errors=True)
            error = writing.exception() if failed else None
            raise TrainingStateError(self._not_written(state, error)) from error
        if done == self.group.ranks:
            self._writing = None
            self._commit(state)

    def finish(self) -> None:
        """Wait for the state that is being written.

        Raises:
            TrainingStateError: it could not be written; older ones stay.
        """
        while self._writing is not None:
            self._writing[1].exception()
            self.poll()

    def close(self) -> None:
        """End the work in the background, after an error elsewhere, too.

        A process that is alone still names what it has written. Of several, others may have stopped before
        they wrote their parts.
        """
        with contextlib.suppress(TrainingStateError):
            if self.group.ranks == 1:
                self.finish()
        self._pool.shutdown(wait=True)

    def _partial(self, state: TrainingState) -> Path:
        return self.folder / f".step-{state.step:08d}{PARTIAL}"

    def _commit(self, state: TrainingState) -> None:
        partial, path = self._partial(state), self.folder / f"step-{state.step:08d}"
        if self.group.first:
            try:
                write_json(partial / "state.json", asdict(state))
                _force_to_disk(partial / "state.json")
                shutil.rmtree(path, ignore_errors=True)
                os.replace(partial, path)
                _force_to_disk(self.folder)
            except OSError as error:
                raise TrainingStateError(self._not_written(state, error)) from error
            self._remove_old()
        self.group.wait()

    def _remove_old(self) -> None:
        """Remove older states and what a killed process left half-written."""
        for path in training_states(self.folder)[self.keep :]:
            shutil.rmtree(path, ignore_errors=True)
        for path in self.folder.iterdir():
            if path.name.endswith(PARTIAL):
                shutil.rmtree(path, ignore_errors=True)

    def _not_written(self, state: TrainingState, error: BaseException | None) -> str:
        older = next(iter(training_states(self.folder)), None)
        kept = f"the last good one, {older}, is intact" if older else "there is none before it"
        return (
            f"the checkpoint of step {state.step} could not be written ({error or 'by another process'}); "
            f"{kept}: free some space, or mend what is wrong, and run the same command again with --resume"
        )


def _make_folder(path: Path) -> None:
    try:
        path.mkdir(parents=True)
    except OSError as error:
        raise TrainingStateError(
            f"{path} cannot be made ({error.strerror}); mend that, and use --resume"
        ) from None


def _write_part(partial: Path, rank: int, tensors: dict[str, Tensor], parts: dict[str, Any]) -> None:
    file = partial / f"rank-{rank:05d}.safetensors"
    save_file(tensors, file)
    _force_to_disk(file)
    description = file.with_suffix(".json")
    write_json(description, {**parts, "digest": _digest(file)})
    _force_to_disk(description)


def training_states(folder: Path) -> list[Path]:
    """The directories of complete states below ``folder``, the newest first."""
    paths = list(folder.iterdir()) if folder.is_dir() else []
    found = [path for path in paths if _STEP_FOLDER.fullmatch(path.name)]
    return sorted(found, key=_step_of, reverse=True)


def read_training_state(path: Path) -> TrainingState:
    """Read how far a state's run was, without its tensors.

    Raises:
        TrainingStateError: it is missing, damaged or of another kind.
    """
    file = path / "state.json"
    try:
        given = read_json(file)
    except FileFormatError as error:
        raise TrainingStateError(str(error)) from None
    values = check_keys(TrainingState, given, str(file), TrainingStateError)
    if values.get("format") != FORMAT:
        raise TrainingStateError(f"{file}: the format is {values.get('format')!r}; expected {FORMAT!r}")
    for name in ("step", "tokens", "ranks"):
        if not is_count(values[name], 0):
            raise TrainingStateError(f"{file}: {name} is {values[name]!r}; expected a whole number")
    return TrainingState(**values)


def check_parts(path: Path, state: TrainingState, group: Group) -> str | None:
    """What is wrong with the files of a state, if anything is; each process looks at its share of them."""
    for rank in range(group.rank, state.ranks, group.ranks):
        file = path / f"rank-{rank:05d}.safetensors"
        try:
            described = read_json(file.with_suffix(".json"))
            if not isinstance(described, dict) or not isinstance(described.get("parts"), dict):
                return f"{file.with_suffix('.json')} says nothing of tensors"
            if described.get("digest") != _digest(file):
                return f"{file} is cut short or damaged: its digest is not what it was"
        except (FileFormatError, OSError) as error:
            return f"{file} is missing or cannot be read ({error})"
    return None


def load_data_state(path: Path, state: TrainingState) -> dict[str, Any]:
    """Where all lanes of the data stood."""
    lanes: dict[str, Any] = {}
    for rank in range(state.ranks):
        lanes |= read_json(path / f"rank-{rank:05d}.json")["lanes"]
    return lanes


def load_training_tensors(
    path: Path,
    state: TrainingState,
    trained: Mapping[str, Tensor],
    optimizer: torch.optim.Optimizer,
    group: Group,
) -> None:
    """Read a state's weights and moments into place, whatever number of processes wrote them.

    Raises:
        TrainingStateError: a file is missing or damaged, or names or shapes are not those of ``trained``;
            nothing was changed then.
    """
    stored = _Stored(path, state)
    stored.check(trained)
    rows = _own_rows(trained, group)
    with torch.no_grad():
        for name, parameter in trained.items():
            stored.fill(f"weight/{name}", rows[name], local(parameter))
            if name in stored.steps:
                moments = {key: torch.zeros_like(parameter) for key in MOMENTS}
                for key, moment in moments.items():
                    stored.fill(f"{key}/{name}", rows[name], local(moment))
                # On the parameter's device: the fused kernel wants the step counter there, too.
                step = stored.steps[name].to(local(parameter).device)
                optimizer.state[parameter] = {"step": step, **moments}


class _Stored:
    """The tensors of a state in the files of all its processes."""

    def __init__(self, path: Path, state: TrainingState) -> None:
        self.path = path
        self.steps: dict[str, Tensor] = {}
        self.files: list[tuple[Any, dict[str, list[Any]], set[str]]] = []
        for rank in range(state.ranks):
            file = path / f"rank-{rank:05d}.safetensors"
            try:
                opened = safe_open(file, framework="pt")
                keys = set(opened.keys())
                parts = read_json(file.with_suffix(".json"))["parts"]
            except (OSError, SafetensorError, FileFormatError) as error:
                raise TrainingStateError(
                    f"{file} cannot be read ({error}): it is missing, cut short or of another kind; "
                    "restore it, or remove the run directory and start again"
                ) from None
            self.files.append((opened, parts, keys))
            names = (key for key in keys if key.startswith("step/"))
            self.steps |= {key.removeprefix("step/"): opened.get_tensor(key) for key in names}

    def check(self, trained: Mapping[str, Tensor]) -> None:
        """Each row of each weight is there once; a parameter has all moments or none; none is left over."""
        names = {name for _, parts, _ in self.files for name in parts}
        if missing := sorted(trained.keys() - names):
            raise TrainingStateError(self._foreign(f"lacks {missing[0]!r} and {len(missing) - 1} more"))
        if surplus := sorted(names - trained.keys()):
            raise TrainingStateError(
                self._foreign(f"holds {surplus[0]!r} and {len(surplus) - 1} more that are not trained")
            )
        for name, parameter in trained.items():
            kinds = ("weight", *MOMENTS) if name in self.steps else ("weight",)
            for kind in kinds:
                self._check_rows(f"{kind}/{name}", name, tuple(parameter.shape))

    def _check_rows(self, key: str, name: str, shape: tuple[int, ...]) -> None:
        found = 0
        for opened, parts, keys in self.files:
            start, rows, whole = parts.get(name, (found, 0, shape))
            if tuple(whole) != shape:
                raise TrainingStateError(
                    self._foreign(f"holds {key!r} of shape {tuple(whole)}, expected {shape}")
                )
            held = tuple(opened.get_slice(key).get_shape()) if key in keys else (0, *shape[1:])
            if start != found or held != (rows, *shape[1:]):
                raise TrainingStateError(self._foreign(f"lacks rows of {key!r} from {found}"))
            found += rows
        if found != shape[0]:
            raise TrainingStateError(self._foreign(f"lacks rows of {key!r} from {found}"))

    def fill(self, key: str, own: list[Any], target: Tensor) -> None:
        """Copy the rows that a process needs."""
        name, begin, end = key.partition("/")[2], own[0], own[0] + own[1]
        for opened, parts, _ in self.files:
            start, rows, _ = parts.get(name, (0, 0, ()))
            first, last = max(begin, start), min(end, start + rows)
            if first < last:
                piece = opened.get_slice(key)[first - start : last - start]
                target[first - begin : last - begin].copy_(piece)

    def _foreign(self, what: str) -> str:
        return (
            f"{self.path} is not a state of this run: it {what}; "
            "resume with the supernet that the run started from"
        )


def _own_tensors(
    trained: Mapping[str, Tensor], optimizer: torch.optim.Optimizer
) -> Iterator[tuple[str, Tensor]]:
    for name, parameter in trained.items():
        if local(parameter).numel():
            yield f"weight/{name}", local(parameter)
        for key, value in optimizer.state.get(parameter, {}).items():
            if key == "step" or local(value).numel():
                yield f"{key}/{name}", local(value)


def _own_rows(trained: Mapping[str, Tensor], group: Group) -> dict[str, list[Any]]:
    """First row, number of rows and whole shape of this process's part of each parameter."""
    rows = {}
    for name, parameter in trained.items():
        each = -(-parameter.shape[0] // group.ranks)
        start = min(group.rank * each, parameter.shape[0])
        rows[name] = [start, local(parameter).shape[0], list(parameter.shape)]
    return rows


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()[:16]


def _force_to_disk(path: Path) -> None:
    """Without this a power cut after the rename could leave empty files under a good name."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _step_of(path: Path) -> int:
    match = _STEP_FOLDER.fullmatch(path.name)
    assert match is not None
    return int(match[1])

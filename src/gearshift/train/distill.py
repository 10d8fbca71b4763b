"""Stochastic distillation as a run: a directory that can be killed at any moment and resumed."""

from __future__ import annotations

import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from types import FrameType
from typing import Any

from gearshift.errors import GearshiftError, OutputExistsError
from gearshift.files import atomic_file
from gearshift.placement import FULL_ATTENTION
from gearshift.progress import show_progress
from gearshift.supernet import SupernetForCausalLM, checkpoint_digest, load_supernet, save_supernet
from gearshift.supernet.tensor_files import TORCH_DTYPES, TensorFiles
from gearshift.train.checkpoint import (
    TrainingState,
    latest_training_state,
    load_training_tensors,
    read_training_state,
    save_training_state,
)
from gearshift.train.data import PackedTokens
from gearshift.train.device import choose_device
from gearshift.train.metrics import MetricsLog
from gearshift.train.recipe import DistillRecipe, describe_changes, write_recipe
from gearshift.train.tokens import check_vocabulary, load_tokenizer, pack_files, tokens_digest
from gearshift.train.trainer import StepResult, Trainer


class RunError(GearshiftError):
    """A run cannot start, or cannot go on, with what was given."""


@dataclass(frozen=True)
class RunDirectory:
    """Where a run keeps what."""

    root: Path

    @property
    def recipe(self) -> Path:
        """The recipe with every value spelled out."""
        return self.root / "recipe.yaml"

    @property
    def metrics(self) -> Path:
        """One JSON line a step."""
        return self.root / "metrics.jsonl"

    @property
    def checkpoint(self) -> Path:
        """The latest training state."""
        return self.root / "checkpoint"

    @property
    def supernet(self) -> Path:
        """The result; it is there only when the run has finished."""
        return self.root / "supernet"


def distill(recipe: DistillRecipe, *, resume: bool = False, progress: bool = True) -> Path:
    """Train the mixers of a supernet against its own full-attention path.

    Kill it at any moment and call it again with ``resume``: batches and placements go on where they were, and
    on a CPU with the same number of threads the losses are bit for bit those of an uninterrupted run. Ctrl-C
    ends the step in progress, writes a checkpoint and then interrupts; a second Ctrl-C interrupts at once.

    Args:
        recipe: what to do.
        resume: go on from the latest checkpoint in ``recipe.out``, or start if there is none.
        progress: show a progress bar, or lines where stderr is no terminal.

    Returns:
        The distilled supernet directory, ``recipe.out / "supernet"``.

    Raises:
        RunError: the run cannot go on with this recipe, supernet or data.
        OutputExistsError: ``recipe.out`` holds something, and ``resume`` is false.
        TrainingStateError: a checkpoint cannot be written or is damaged.
        DivergedError: the loss is not a finite number any more.
        GearshiftError: the supernet, its tokenizer, the data or the device is missing or damaged.
    """
    directory = RunDirectory(recipe.out)
    earlier = _earlier_state(directory, recipe, resume)
    if directory.supernet.exists():
        return directory.supernet
    trainer, state = _prepare(recipe)
    if earlier is not None:
        state = _restore(earlier, state, trainer)
    with atomic_file(directory.recipe) as partial:
        write_recipe(recipe, partial)
    _train(directory, trainer, state, progress)
    _restore_dtypes(trainer.model, recipe.supernet)
    return save_supernet(trainer.model.eval(), directory.supernet, source=recipe.supernet)


def _restore_dtypes(model: SupernetForCausalLM, supernet: Path) -> None:
    """Give what was not trained its stored type again: it leaves as it came, bit for bit."""
    infos = TensorFiles(supernet).infos
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            parameter.data = parameter.data.to(TORCH_DTYPES[infos[name].dtype])


def _earlier_state(directory: RunDirectory, recipe: DistillRecipe, resume: bool) -> Path | None:
    """The training state to go on from, checked against the recipe before anything is loaded."""
    if not resume and directory.root.exists() and (directory.root.is_file() or any(directory.root.iterdir())):
        raise OutputExistsError(
            f"the run directory {directory.root} already exists; go on with --resume, or give another 'out'"
        )
    earlier = latest_training_state(directory.checkpoint)
    if earlier is not None:
        changes = describe_changes(DistillRecipe.model_validate(read_training_state(earlier).recipe), recipe)
        if changes:
            raise RunError(
                f"{earlier} was made with another recipe ({'; '.join(changes)}); "
                f"resume with {directory.recipe}, or give another 'out'"
            )
    return earlier


def _prepare(recipe: DistillRecipe) -> tuple[Trainer, TrainingState]:
    """Load everything and refuse what cannot work; nothing is written yet."""
    model = load_supernet(recipe.supernet, device=choose_device(recipe.device))
    _check_model(model, recipe)
    tokens = pack_files(recipe.data, load_tokenizer(recipe.supernet))
    _check_tokens(tokens, model, recipe)
    state = TrainingState(
        step=0,
        tokens=0,
        recipe=recipe.model_dump(mode="json"),
        supernet=checkpoint_digest(recipe.supernet),
        data=tokens_digest(tokens),
    )
    return Trainer(model, tokens, recipe), state


def _check_model(model: SupernetForCausalLM, recipe: DistillRecipe) -> None:
    space = model.placement_space
    mixers = space.mixers
    if FULL_ATTENTION not in mixers or len(mixers) == 1:
        raise RunError(
            f"{recipe.supernet} holds only {', '.join(mixers)}; "
            "expected full_attention, the teacher, and others to train"
        )
    space.teacher()  # refuses a supernet in which it cannot be run
    if recipe.sequence_length > model.config.max_position_embeddings:
        raise RunError(
            f"sequence_length is {recipe.sequence_length}; the teacher was made for "
            f"{model.config.max_position_embeddings} tokens at most"
        )


def _check_tokens(tokens: PackedTokens, model: SupernetForCausalLM, recipe: DistillRecipe) -> None:
    tokens.batch(1, 0, 1, recipe.sequence_length, recipe.seed)  # refuses a stream shorter than one sequence
    check_vocabulary(tokens.tokens, model.config.vocab_size, recipe.supernet)


def _restore(path: Path, fresh: TrainingState, trainer: Trainer) -> TrainingState:
    state = read_training_state(path)
    for what, before, now in (
        ("supernet", state.supernet, fresh.supernet),
        ("data", state.data, fresh.data),
    ):
        if before != now:
            raise RunError(
                f"{path} was made with another {what} (digest {before}, now {now}); "
                "resume with what the run started from, or give another 'out'"
            )
    load_training_tensors(path, trainer.trained, trainer.optimizer)
    return replace(state, recipe=fresh.recipe)


def _train(directory: RunDirectory, trainer: Trainer, state: TrainingState, progress: bool) -> None:
    """Take the remaining steps; a row of metrics a step, a checkpoint every so often and at the end."""
    recipe = trainer.recipe
    with (
        MetricsLog(directory.metrics, state.step) as log,
        show_progress("distil", recipe.steps, state.step, progress) as report,
        finishing_steps() as interrupted,
    ):
        for step in range(state.step + 1, recipe.steps + 1):
            began = time.perf_counter()
            result = trainer.train_step(step)
            tokens_per_second = result.tokens / (time.perf_counter() - began)
            state = replace(state, step=step, tokens=state.tokens + result.tokens)
            log.append(_row(result, state.tokens, tokens_per_second))
            report(step, f"{result.stage}  loss {result.loss:.3f}  {tokens_per_second:,.0f} tokens/s")
            stop = interrupted()
            if stop or step % recipe.save_every == 0 or step == recipe.steps:
                save_training_state(directory.checkpoint, state, trainer.trained, trainer.optimizer)
            if stop:
                raise KeyboardInterrupt


def _row(result: StepResult, tokens: int, tokens_per_second: float) -> dict[str, Any]:
    return asdict(result) | {"tokens": tokens, "tokens_per_second": round(tokens_per_second, 1)}


@contextmanager
def finishing_steps() -> Iterator[Callable[[], bool]]:
    """Hold the first Ctrl-C back, so that a step is never cut in two; yields whether there was one.

    A second one interrupts at once. Outside the main thread, where Python delivers no signals, nothing is
    held.
    """
    asked = False

    def hold(number: int, frame: FrameType | None) -> None:
        nonlocal asked
        if asked:
            raise KeyboardInterrupt
        asked = True
        print("stopping after this step; Ctrl-C again stops at once", file=sys.stderr, flush=True)

    if threading.current_thread() is not threading.main_thread():
        yield lambda: False
        return
    before = signal.signal(signal.SIGINT, hold)
    try:
        yield lambda: asked
    finally:
        signal.signal(signal.SIGINT, before)

"""A training run: a directory that can be killed at any moment and resumed."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from gearshift.files import atomic_file, write_json
from gearshift.progress import show_progress
from gearshift.provenance import provenance
from gearshift.supernet import checkpoint_digest
from gearshift.supernet.checkpoint import read_config
from gearshift.train.checkpoint import Saver, TrainingState
from gearshift.train.device import choose_device
from gearshift.train.directory import RunDirectory
from gearshift.train.distributed import Group, joined_group
from gearshift.train.export import export_supernet
from gearshift.train.flops import Sizes
from gearshift.train.interrupts import finishing_steps
from gearshift.train.judge import Judge
from gearshift.train.metrics import MetricsLog
from gearshift.train.packing import Loader
from gearshift.train.recipe import DistillStage, Recipe, RecordStage
from gearshift.train.recipe_file import write_recipe
from gearshift.train.record import record_step
from gearshift.train.resume import load_latest, refuse_other_run
from gearshift.train.rows import Row, Rows, note
from gearshift.train.setup import check_model, make_trainer
from gearshift.train.stage_data import StageData, layout_of
from gearshift.train.tokens import check_tokenizer, load_tokenizer
from gearshift.train.top_k import TopKReader
from gearshift.train.trackers import check_trackers, open_trackers


def train(recipe: Recipe, *, resume: bool = False, progress: bool = True) -> Path:
    """Do what a recipe says, stage by stage.

    Kill it at any moment and call it again with ``resume``: batches and placements go on where they were, and
    on a CPU with the same number of threads the losses are bit for bit those of an uninterrupted run. Ctrl-C
    ends the step in progress, writes a checkpoint and then interrupts; a second Ctrl-C interrupts at once.
    Under ``torchrun`` every process calls this with the same arguments.

    Args:
        recipe: what to do.
        resume: go on from the latest good checkpoint in ``recipe.out``, or start if there is none.
        progress: show a progress bar, or lines where stderr is no terminal.

    Returns:
        The trained supernet directory, ``recipe.out / "supernet"``; of a recipe that ends with the stage
        ``record``, the folder that it wrote.

    Raises:
        RunError: the run cannot go on with this recipe, supernet or data.
        OutputExistsError: ``recipe.out`` holds something, and ``resume`` is false.
        TrainingStateError: a checkpoint cannot be written, or all of them are damaged.
        DivergedError: the loss is not a finite number any more.
        GearshiftError: the supernet, its tokenizer, the data or the device is missing or damaged.
    """
    directory = RunDirectory(recipe.out)
    refuse_other_run(directory, recipe, resume)
    if directory.supernet.exists():
        return directory.supernet
    with joined_group(choose_device(recipe.device)) as group:
        run = _Run(directory, recipe, group)
        run.go(progress)
        last = recipe.stages[-1]
        if isinstance(last, RecordStage):
            return last.write
        export_supernet(run.trainer.trained, recipe.supernet, directory.supernet, group)
    return directory.supernet


class _Run:
    """Everything loaded; what cannot work is refused before anything is written."""

    def __init__(self, directory: RunDirectory, recipe: Recipe, group: Group) -> None:
        self.directory, self.recipe, self.group = directory, recipe, group
        check_trackers(recipe)
        check_model(recipe)
        _check_stages(recipe, group)
        config, tokenizer = read_config(recipe.supernet), load_tokenizer(recipe.supernet)
        check_tokenizer(tokenizer, config.vocab_size, recipe.supernet)
        self.data = StageData(recipe, tokenizer)
        self.data.check(group)
        self.trainer = make_trainer(recipe, group)
        checks = recipe.held_out
        self.judge = None if checks is None else Judge(recipe, checks, self.data, self.trainer.passes)
        self.rows = Rows(recipe, Sizes.of(config), group)
        digest = checkpoint_digest(recipe.supernet)
        fresh = TrainingState(0, 0, recipe.model_dump(mode="json"), digest, self.data.digests)
        self.state, self.lanes = load_latest(directory.checkpoint, fresh, self.trainer, group)
        self.saver = Saver(directory.checkpoint, group)
        self.loader: tuple[int, Loader] | None = None

    def go(self, progress: bool) -> None:
        """Take the remaining steps; a row of metrics a step, a checkpoint every so often and at the end."""
        recipe, first = self.recipe, self.group.first
        with ExitStack() as open_things:
            append = self._start_files(open_things) if first else None
            shown = show_progress("train", recipe.steps, self.state.step, progress and first)
            report = open_things.enter_context(shown)
            interrupted = open_things.enter_context(finishing_steps())
            open_things.callback(self._close_loader)
            open_things.callback(self.saver.close)
            for step in range(self.state.step + 1, recipe.steps + 1):
                row = self._take(step)
                if append is not None:
                    append(row)
                report(step, note(row))
                self._save(step, interrupted())
            self.saver.finish()

    def _start_files(self, open_things: ExitStack) -> Callable[[Row], None]:
        directory = self.directory
        with atomic_file(directory.recipe) as partial:
            write_recipe(self.recipe, partial)
        write_json(directory.provenance, {**provenance(), "processes": self.group.ranks})
        trackers = open_trackers(self.recipe, directory.root)
        return open_things.enter_context(MetricsLog(directory.metrics, self.state.step, trackers)).append

    def _take(self, step: int) -> Row:
        """One step, and its row."""
        began = time.perf_counter()
        index, number = self.recipe.stage_of(step)
        stage = self.recipe.stages[index]
        batches = self._loader(index, first=number == 1).next()
        tokens = self.state.tokens + stage.tokens_per_step
        if isinstance(stage, RecordStage):
            record_step(self.trainer.passes, stage, number, batches, self.group)
            seconds = time.perf_counter() - began
            row = {"step": step, "stage": stage.stage, "loss": None, "tokens": tokens}
            row["tokens_per_second"] = round(stage.tokens_per_step / seconds, 1)
        else:
            result = self.trainer.train_step(step, batches)
            row = self.rows.row(result, tokens, time.perf_counter() - began)
        if self.judge is not None and (step % self.judge.every == 0 or step == self.recipe.steps):
            row["held_out"] = self.judge()
        self.state = replace(self.state, step=step, tokens=tokens)
        return row

    def _loader(self, index: int, first: bool) -> Loader:
        """The loader of a stage; at its first step a new one, after a restart where it was."""
        if self.loader is None or self.loader[0] != index:
            self._close_loader()
            loader = self.data.loader(index, self.group)
            if self.lanes is not None and not first:
                loader.restore(self.lanes)
            self.loader = index, loader
        return self.loader[1]

    def _close_loader(self) -> None:
        if self.loader is not None:
            self.loader[1].close()
            self.loader = None

    def _save(self, step: int, asked: bool) -> None:
        stop = torch.tensor(float(asked), device=self.group.device)
        stopping = bool(self.group.add_up(stop).item())
        self.saver.poll()
        if stopping or step % self.recipe.save_every == 0 or step == self.recipe.steps:
            assert self.loader is not None
            data: dict[str, Any] = self.loader[1].state
            self.saver.save(self.state, self.trainer.trained, self.trainer.optimizer, data)
        if stopping:
            self.saver.finish()
            raise KeyboardInterrupt


def _check_stages(recipe: Recipe, group: Group) -> None:
    """Stages go into the processes, and what they read is there or will be."""
    recorded: set[Path] = set()
    for stage in recipe.stages:
        layout_of(stage, group.rank, group.ranks)
        if isinstance(stage, RecordStage):
            recorded.add(stage.write)
        elif isinstance(stage, DistillStage) and stage.teacher_logits not in {None, *recorded}:
            assert stage.teacher_logits is not None
            TopKReader(stage.teacher_logits)

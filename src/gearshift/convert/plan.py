"""A conversion as a plan: every tensor that will be written, and where it comes from.

A plan is made from headers and configs alone, so that it can be shown before anything large is read. Then it
runs, step by step, and holds no more than the tensors of one step.
"""

from __future__ import annotations

import itertools
import shutil
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from gearshift.errors import CheckpointError
from gearshift.files import atomic_directory
from gearshift.progress import show_progress
from gearshift.supernet.checkpoint import EXTRA, check_shapes, copy_companions, writing
from gearshift.supernet.config import SupernetConfig
from gearshift.supernet.shards import SHARD_BYTES, ShardWriter, assign_shards
from gearshift.supernet.tensor_files import BLOCK_BYTES, TORCH_DTYPES, TensorFiles, all_finite, as_bytes
from gearshift.tensor_headers import TensorInfo

COPIED = "copied"
FLOAT32_BYTES = 4

ReadTensor = Callable[[str], Tensor]
Report = Callable[[int, str], None]


@dataclass(frozen=True)
class PlannedTensor:
    """One tensor of the output.

    Attributes:
        name: its name.
        info: its shape and dtype.
        sources: names of the tensors that it is made from.
        how: ``copied``, or the name of the recipe that makes it.
    """

    name: str
    info: TensorInfo
    sources: tuple[str, ...]
    how: str


@dataclass(frozen=True)
class Step:
    """Tensors that are made together.

    Attributes:
        tensors: what is made.
        make: reads sources by name and returns the tensors by name, in any floating dtype; None where every
            tensor is a copy of its one source.
        memory: bytes of memory that it takes at most; see :func:`working_memory`.
    """

    tensors: tuple[PlannedTensor, ...]
    make: Callable[[ReadTensor], dict[str, Tensor]] | None = None
    memory: int = BLOCK_BYTES


@dataclass(frozen=True)
class Plan:
    """A directory that can be written.

    Attributes:
        config: what ``config.json`` will say: a supernet's config, or the text of another model's.
        steps: what makes its tensors, in order.
        source: the directory that they are read from.
        companions: files and folders that come along as they are.
        texts: further small files, by name.
        extra: tensors that are copied into the folder ``teacher_extra``.

    Raises:
        CheckpointError: the tensors are not those of the supernet with this config.
    """

    config: SupernetConfig | bytes
    steps: tuple[Step, ...]
    source: Path
    companions: tuple[Path, ...] = ()
    texts: Mapping[str, bytes] = field(default_factory=dict)
    extra: tuple[PlannedTensor, ...] = ()

    def __post_init__(self) -> None:
        tensors = [tensor for step in self.steps for tensor in step.tensors]
        assert len(self.infos) == len(tensors), "a tensor is planned twice"
        if isinstance(self.config, SupernetConfig):
            shapes = {tensor.name: tensor.info.shape for tensor in tensors}
            copied = {tensor.name: tensor.sources[0] for tensor in tensors if tensor.how == COPIED}
            check_shapes(self.source, self.config, shapes, copied)

    @property
    def infos(self) -> dict[str, TensorInfo]:
        """Shape and dtype of every tensor but the extra ones, in the order of writing."""
        return {tensor.name: tensor.info for step in self.steps for tensor in step.tensors}

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors that are written."""
        extra = sum(tensor.info.nbytes for tensor in self.extra)
        return extra + sum(info.nbytes for info in self.infos.values())

    @property
    def memory(self) -> int:
        """Bytes of memory that tensors take at most while the plan runs, beside the program itself."""
        return max((step.memory for step in self.steps), default=0)

    @property
    def shards(self) -> int:
        """How many weight files there will be, without those of the extra tensors."""
        return len(assign_shards(self.infos, SHARD_BYTES))


def working_memory(sources: Iterable[TensorInfo], results: Iterable[TensorInfo]) -> int:
    """Bytes that a step takes at most: sources and results in float32, and results once more on the way."""
    numbers = sum(info.numel for info in sources) + 2 * sum(info.numel for info in results)
    return numbers * FLOAT32_BYTES


def run_plan(
    plan: Plan, source: TensorFiles, out: Path | str, *, overwrite: bool = False, progress: bool = False
) -> Path:
    """Write the directory that is planned; it appears whole or not at all.

    Args:
        plan: what to write.
        source: what the plan's steps read.
        out: where.
        overwrite: replace what is there.
        progress: show a progress bar, or lines where stderr is no terminal.

    Raises:
        OutputExistsError: there is something and ``overwrite`` is false.
        CheckpointError: a source is damaged, a tensor cannot be made, or the disk is full or read-only.
    """
    out = Path(out)
    with writing(out), atomic_directory(out, overwrite) as partial:
        check_space(plan, out)
        with show_progress("write", plan.nbytes, enabled=progress, in_bytes=True) as report:
            written = _write_steps(plan.steps, source, partial, report)
            if plan.extra:
                (partial / EXTRA).mkdir()
                _write_steps((Step(plan.extra),), source, partial / EXTRA, report, written)
        copy_companions(plan.companions, partial)
        for name, text in plan.texts.items():
            (partial / name).write_bytes(text)
        # Last: without it, what a killed process leaves behind is no model directory.
        if isinstance(plan.config, bytes):
            (partial / "config.json").write_bytes(plan.config)
        else:
            plan.config.save_pretrained(partial)
    return out


def check_space(plan: Plan, out: Path) -> None:
    """Refuse to begin what cannot end.

    Raises:
        CheckpointError: the disk has less room than the plan needs.
    """
    free = free_bytes(out)
    if free < plan.nbytes:
        raise CheckpointError(
            f"could not write {out}: no space left on the disk: it needs {plan.nbytes:,} bytes, and {free:,} "
            "are free; free some, or give another path. Nothing half-written was left there"
        )


def free_bytes(out: Path) -> int:
    """Free bytes of the disk on which ``out`` lies or will lie."""
    there = next(folder for folder in out.absolute().parents if folder.exists())
    return shutil.disk_usage(there).free


def _write_steps(
    steps: Iterable[Step], source: TensorFiles, directory: Path, report: Report, written: int = 0
) -> int:
    """Write what the steps make; returns how many bytes are written in all.

    Copies wait for the disk and new tensors for the processor, so each kind has a thread of its own.
    """
    steps = tuple(steps)
    infos = {tensor.name: tensor.info for step in steps for tensor in step.tensors}
    copies = tuple(step for step in steps if step.make is None)
    with ShardWriter(directory, infos, SHARD_BYTES) as writer, _one_thread():
        run = _Run(source, writer, report, written)
        with _beside(lambda stop: run.copy(copies, stop)) as check:
            run.make(tuple(step for step in steps if step.make is not None), check)
    return run.written


class _Run:
    """Steps on their way into files; copies and new tensors may be written at the same time."""

    def __init__(self, source: TensorFiles, writer: ShardWriter, report: Report, written: int) -> None:
        self.source, self.writer, self.report, self.written = source, writer, report, written
        self._lock = threading.Lock()

    def copy(self, steps: Sequence[Step], stop: threading.Event) -> None:
        """Write steps of copies, until there are no more or it is told to stop."""
        for step in self._read_ahead(steps):
            for tensor in step.tensors:
                if stop.is_set():
                    return
                self.writer.copy(tensor.name, self.source, tensor.sources[0])
                self._count(tensor)

    def make(self, steps: Sequence[Step], check: Callable[[], None]) -> None:
        """Make and write new tensors; ``check`` is called between steps and may raise."""
        for step in self._read_ahead(steps):
            check()
            assert step.make is not None
            made = step.make(self.source.read)
            for tensor in step.tensors:
                _write_made(tensor, made.pop(tensor.name), self.writer)
                self._count(tensor)
            assert not made, "a step made more than was planned"

    def _read_ahead(self, steps: Sequence[Step]) -> Iterator[Step]:
        for step, later in itertools.zip_longest(steps, steps[1:]):
            if later is not None:
                self.source.prefetch({name for tensor in later.tensors for name in tensor.sources})
            yield step

    def _count(self, tensor: PlannedTensor) -> None:
        with self._lock:
            self.written += tensor.info.nbytes
            self.report(self.written, tensor.name)


@contextmanager
def _beside(work: Callable[[threading.Event], None]) -> Iterator[Callable[[], None]]:
    """Do ``work`` in a second thread while the block runs; the block ends when both have ended.

    Yields what raises an error of the work as soon as there is one. ``work`` is told to stop when the block
    fails, or is interrupted.
    """
    stop = threading.Event()
    with ThreadPoolExecutor(1) as pool:
        future = pool.submit(work, stop)
        try:
            yield lambda: future.result() if future.done() else None
            future.result()
        finally:
            stop.set()


@contextmanager
def _one_thread() -> Iterator[None]:
    """Keep torch from sharing out work that is bound by memory.

    Making a mixer is many short operations. Their threads wait for each other after every one, which on a
    busy machine takes several times as long as the work.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _write_made(planned: PlannedTensor, tensor: Tensor, writer: ShardWriter) -> None:
    tensor = tensor.to(TORCH_DTYPES[planned.info.dtype])
    if not all_finite(as_bytes(tensor), planned.info.dtype):
        raise CheckpointError(
            f"{planned.name} would hold infinities or NaN: {planned.how} made it from "
            f"{', '.join(planned.sources)}, whose numbers are too large for {planned.info.dtype}; "
            "give the teacher in a wider dtype"
        )
    writer.write(planned.name, tensor)

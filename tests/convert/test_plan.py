"""Plans: what they say is what is written; and running one, whatever goes wrong."""

from __future__ import annotations

import errno
import os
import shutil
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import gearshift.convert.plan as plan_module
from gearshift.convert.convert import convert_teacher, plan_conversion
from gearshift.convert.plan import COPIED, Plan, PlannedTensor, Step, _beside, run_plan, working_memory
from gearshift.convert.plan_groups import plan_groups
from gearshift.errors import CheckpointError
from gearshift.supernet import load_supernet
from gearshift.supernet.tensor_files import TensorFiles
from gearshift.tensor_headers import TensorInfo

MakeTeacher = Callable[..., Path]


def files_and_bytes(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(directory.iterdir())}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tied", [False, True])
def test_what_is_planned_is_written(
    tied: bool, dtype: torch.dtype, make_teacher: MakeTeacher, tmp_path: Path
):
    teacher = make_teacher(dtype=dtype, tie_word_embeddings=tied)
    before = files_and_bytes(teacher)
    plan = plan_conversion(teacher, window=8)
    out = run_plan(plan, TensorFiles(teacher), tmp_path / "out")
    assert TensorFiles(out).infos == plan.infos
    assert sum(t.nbytes for t in load_file(out / "model.safetensors").values()) == plan.nbytes
    assert {info.dtype for info in plan.infos.values()} == {"F32" if dtype == torch.float32 else "BF16"}
    assert len(list(out.glob("*.safetensors"))) == plan.shards
    assert files_and_bytes(teacher) == before
    assert files_and_bytes(convert_teacher(teacher, tmp_path / "again", window=8)) == files_and_bytes(out)


def test_large_outputs_are_sharded(
    make_teacher: MakeTeacher, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    teacher = make_teacher()
    whole = load_file(convert_teacher(teacher, tmp_path / "whole") / "model.safetensors")
    monkeypatch.setattr(plan_module, "SHARD_BYTES", 30_000)
    plan = plan_conversion(teacher)
    out = run_plan(plan, TensorFiles(teacher), tmp_path / "out")
    shards = [load_file(path) for path in out.glob("*.safetensors")]
    assert len(shards) == plan.shards > 3
    given = {name: tensor for shard in shards for name, tensor in shard.items()}
    assert given.keys() == whole.keys()
    assert all(torch.equal(given[name], tensor) for name, tensor in whole.items())
    load_supernet(out)


def test_a_plan_reads_no_values(make_teacher: MakeTeacher, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(TensorFiles, "read", None)
    monkeypatch.setattr(TensorFiles, "copy_to", None)
    plan_conversion(make_teacher())


def test_groups_hold_every_tensor_and_show_alike_layers_once(make_teacher: MakeTeacher):
    plan = plan_conversion(make_teacher(num_hidden_layers=3, tie_word_embeddings=True))
    outside, layers = plan_groups(plan)
    assert (outside.title, layers.title) == ("outside the layers", "layers 0-2 (3 alike)")
    assert [row.name for row in outside.rows] == ["model.embed_tokens.weight", "model.norm.weight"]
    assert outside.nbytes + 3 * layers.nbytes == plan.nbytes
    assert len(outside.rows) + 3 * len(layers.rows) == len(plan.infos)
    made = next(row for row in layers.rows if row.mixer == "gated_delta_net" and row.name == "A_log")
    assert made.how == "aligned"
    assert "self_attn.q_proj.weight" in made.sources


def test_layers_that_differ_are_shown_apart(make_teacher: MakeTeacher):
    plan = plan_conversion(make_teacher(num_hidden_layers=5))
    steps = []
    for step in plan.steps:
        odd = [t for t in step.tensors if ".3." in t.name and "sliding_attention" in t.name]
        steps += [] if odd else [step]
    titles = [group.title for group in plan_groups(Plan(config=b"", steps=tuple(steps), source=plan.source))]
    assert titles == ["outside the layers", "layers 0-2, 4 (4 alike)", "layer 3"]


def test_the_memory_of_a_step_covers_what_it_holds():
    sources, results = [TensorInfo((10, 10), "BF16")] * 2, [TensorInfo((30,), "BF16")]
    assert working_memory(sources, results) == 4 * (200 + 2 * 30)
    step = Step((), None, 123)
    assert Plan(config=b"", steps=(step, Step(())), source=Path()).memory == max(123, Step(()).memory)


def test_a_plan_that_is_not_its_configs_is_refused(make_teacher: MakeTeacher):
    plan = plan_conversion(make_teacher())
    with pytest.raises(CheckpointError, match=r"lacks 15 tensors \(such as model\.layers\.1\.mixers\.kimi"):
        replace(plan, steps=plan.steps[:-1])
    strange = Step((PlannedTensor("strange", TensorInfo((1,), "F32"), ("a",), COPIED),))
    with pytest.raises(CheckpointError, match=r"has surplus 1 tensors \(such as strange\)"):
        replace(plan, steps=(*plan.steps, strange))


# What happens to the tensors


def one_step_plan(directory: Path, make: Callable[..., dict[str, Tensor]], dtype: str = "F32") -> Plan:
    tensors = (PlannedTensor("b", TensorInfo((2,), dtype), ("a",), "recipe"),)
    return Plan(config=b"{}", steps=(Step(tensors, make),), source=directory)


@pytest.fixture
def source(tmp_path: Path) -> TensorFiles:
    (tmp_path / "source").mkdir()
    save_file({"a": torch.tensor([1.0, 70_000.0])}, tmp_path / "source" / "model.safetensors")
    return TensorFiles(tmp_path / "source")


def test_made_tensors_are_cast_to_the_planned_dtype(source: TensorFiles, tmp_path: Path):
    plan = one_step_plan(source.directory, lambda read: {"b": read("a") + 1}, "BF16")
    (given,) = load_file(run_plan(plan, source, tmp_path / "out") / "model.safetensors").values()
    assert torch.equal(given, torch.tensor([2.0, 70_001.0]).bfloat16())
    assert (tmp_path / "out" / "config.json").read_bytes() == b"{}"


@pytest.mark.parametrize(("dtype", "factor"), [("F16", 1.0), ("F32", float("nan"))])
def test_a_tensor_that_would_not_be_finite_is_named(
    dtype: str, factor: float, source: TensorFiles, tmp_path: Path
):
    plan = one_step_plan(source.directory, lambda read: {"b": read("a") * factor}, dtype)
    with pytest.raises(CheckpointError, match=f"b would hold infinities or NaN: recipe .*a, .* for {dtype}"):
        run_plan(plan, source, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


@pytest.mark.parametrize("wrong", [{}, {"b": torch.ones(2), "c": torch.ones(1)}, {"b": torch.ones(3)}])
def test_a_step_that_makes_something_else_is_our_mistake(
    wrong: dict[str, Tensor], source: TensorFiles, tmp_path: Path
):
    plan = one_step_plan(source.directory, lambda read: dict(wrong))
    with pytest.raises((AssertionError, KeyError)):
        run_plan(plan, source, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_nothing_of_a_step_is_held_when_the_next_begins(tmp_path: Path, source: TensorFiles):
    import weakref

    held: list[Any] = []

    def make(name: str) -> Callable[..., dict[str, Tensor]]:
        def make_one(read: Callable[[str], Tensor]) -> dict[str, Tensor]:
            assert all(reference() is None for reference in held)
            given, made = read("a"), torch.ones(2)
            held.extend((weakref.ref(given), weakref.ref(made)))
            return {name: made}

        return make_one

    steps = tuple(
        Step((PlannedTensor(name, TensorInfo((2,), "F32"), ("a",), "recipe"),), make(name)) for name in "bcd"
    )
    run_plan(Plan(config=b"{}", steps=steps, source=source.directory), source, tmp_path / "out")
    assert len(held) == 6


@pytest.mark.parametrize("extra", [False, True])
def test_extra_tensors_go_to_a_folder_of_their_own(extra: bool, source: TensorFiles, tmp_path: Path):
    more = (PlannedTensor("a", source.infos["a"], ("a",), COPIED),) if extra else ()
    plan = one_step_plan(source.directory, lambda read: {"b": read("a")})
    out = run_plan(replace(plan, extra=more), source, tmp_path / "out")
    assert (out / "teacher_extra").exists() == extra
    if extra:
        assert torch.equal(TensorFiles(out / "teacher_extra").read("a"), source.read("a"))
        assert replace(plan, extra=more).nbytes == plan.nbytes + 8


# The disk


def test_a_disk_without_room_is_refused_before_anything_is_written(
    make_teacher: MakeTeacher, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    teacher = make_teacher()
    needed = plan_conversion(teacher).nbytes
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(0, 0, needed - 1))
    monkeypatch.setattr(plan_module, "ShardWriter", None)
    said = f"no space left on the disk: it needs {needed:,} bytes, and {needed - 1:,} are free"
    with pytest.raises(CheckpointError, match=said):
        convert_teacher(teacher, tmp_path / "new" / "out")
    assert not (tmp_path / "new" / "out").exists()


@pytest.mark.parametrize("method", ["write", "copy"])
@pytest.mark.parametrize(
    ("error", "said"),
    [
        (OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)), "no space left on the disk"),
        (OSError(errno.EIO, os.strerror(errno.EIO)), "Input/output error"),
        (KeyboardInterrupt(), None),
    ],
)
def test_an_end_in_the_middle_leaves_nothing(
    error: BaseException,
    said: str | None,
    method: str,
    make_teacher: MakeTeacher,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
):
    def fail(*arguments: object) -> None:
        raise error

    monkeypatch.setattr(plan_module.ShardWriter, method, fail)
    expected = KeyboardInterrupt if isinstance(error, KeyboardInterrupt) else CheckpointError
    with pytest.raises(expected, match=said):
        convert_teacher(make_teacher(), tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["teacher"]


@pytest.fixture
def read_only(tmp_path: Path) -> Iterator[Path]:
    """A folder in which nothing can be made: its file system, or at least its mode, does not allow it."""
    path = tmp_path / "read-only"
    path.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "ro", "tmpfs", str(path)]
    mounted = (
        shutil.which("mount") and not subprocess.run(command, capture_output=True, check=False).returncode
    )
    if not mounted:
        path.chmod(0o500)
        if os.access(path, os.W_OK):
            pytest.skip("this user may write anywhere and mount nothing")
    yield path
    if mounted:
        subprocess.run(["umount", str(path)], check=True)
    path.chmod(0o700)


def test_a_read_only_place_is_named(read_only: Path, make_teacher: MakeTeacher):
    with pytest.raises(CheckpointError, match=r"could not write .*out: .*(Read-only|Permission denied)"):
        convert_teacher(make_teacher(), read_only / "out")
    assert list(read_only.iterdir()) == []


def test_what_fails_beside_ends_the_making_too() -> None:
    def fail(stop: threading.Event) -> None:
        raise CheckpointError("the copy failed")

    steps = 0
    with pytest.raises(CheckpointError, match="the copy failed"), _beside(fail) as check:
        while steps < 10_000:
            steps += 1
            time.sleep(0.001)
            check()
    assert steps < 10_000


def test_what_runs_beside_is_told_to_stop_when_the_making_fails() -> None:
    told = []

    def wait(stop: threading.Event) -> None:
        told.append(stop.wait(30))

    with pytest.raises(KeyboardInterrupt), _beside(wait):
        raise KeyboardInterrupt
    assert told == [True]

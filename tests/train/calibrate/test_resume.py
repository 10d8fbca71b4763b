"""Calibrations that are killed at any moment, and resumed."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from gearshift.errors import OutputExistsError
from gearshift.train.calibrate import CalibrationError, fit, run
from gearshift.train.calibrate.directory import CalibrationDirectory
from tests.train.calibrate.tools import (
    RUN_SETTINGS,
    contents,
    go,
    rows,
    same_result,
    tiny_settings,
)

LAYERS = range(3)
TRAINED = ("sliding_attention", "gated_delta_net", "kimi_delta_attention")


class Stopped(Exception):
    """Stands for a kill."""


def stop(*_: object, **__: object) -> None:
    raise Stopped


def stop_in_layer(layer: int, function: Callable[..., Any]) -> Callable[..., Any]:
    """The function, but for the layer ``layer``, in which it raises."""

    def stopping(self: Any, number: int, *arguments: Any) -> Any:
        return stop() if number == layer else function(self, number, *arguments)

    return stopping


def resume(supernet: Path, texts: Path, out: Path) -> list[int]:
    """Returns the layers that were shown."""
    shown: list[int] = []

    def note(rows: Sequence[dict[str, Any]]) -> None:
        shown.append(rows[0]["layer"])

    go(supernet, texts, out, resume=True, layer_done=note)
    return shown


@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize(
    "where", ["before the teacher", "in the steps", "before its folder", "after its folder"]
)
def test_stopped_anywhere_in_a_layer_it_goes_on_to_the_same_bits(
    layer: int,
    where: str,
    supernet_directory: Path,
    texts: Path,
    reference: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
):
    with monkeypatch.context() as patch:
        if where == "before the teacher":
            patch.setattr(run.TeacherWalk, "observe", stop_in_layer(layer, run.TeacherWalk.observe))
        elif where == "in the steps":
            patch.setattr(fit, "take_steps", _stop_in_second_mixer_of(layer))
        elif where == "before its folder":
            finish = CalibrationDirectory.finish_layer
            patch.setattr(CalibrationDirectory, "finish_layer", stop_in_layer(layer, finish))
        else:  # its folder is there, and so is still what only this layer needed
            hidden = f"hidden-{layer:05}.bin"
            patch.setattr(Path, "unlink", _stop_for(hidden, Path.unlink))
        with pytest.raises(Stopped):
            go(supernet_directory, texts, tmp_path / "run")
    assert not (tmp_path / "run" / "supernet").exists()
    assert resume(supernet_directory, texts, tmp_path / "run") == list(LAYERS)
    assert same_result(tmp_path / "run", reference)
    assert not (tmp_path / "run" / "work").exists()


def _stop_in_second_mixer_of(layer: int) -> Callable[..., Any]:
    taken, take_steps = [], fit.take_steps

    def stopping(*arguments: Any) -> Any:
        taken.append(1)
        return stop() if len(taken) == len(TRAINED) * layer + 2 else take_steps(*arguments)

    return stopping


def _stop_for(name: str, unlink: Callable[..., None]) -> Callable[..., None]:
    def stopping(self: Path, missing_ok: bool = False) -> None:
        return stop() if self.name == name else unlink(self, missing_ok=missing_ok)

    return stopping


@pytest.mark.parametrize("layer", LAYERS)
def test_stopped_between_layers_it_does_only_those_that_are_left(
    layer: int,
    supernet_directory: Path,
    texts: Path,
    reference: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
):
    def shown(rows: Sequence[dict[str, Any]]) -> None:
        if rows[0]["layer"] == layer:
            raise Stopped

    with pytest.raises(Stopped):
        go(supernet_directory, texts, tmp_path / "run", layer_done=shown)
    assert rows(tmp_path / "run") == rows(reference)[: len(TRAINED) * (layer + 1)]
    observed: list[int] = []
    observe = run.TeacherWalk.observe

    def note(self: Any, number: int, *arguments: Any) -> Any:
        observed.append(number)
        return observe(self, number, *arguments)

    monkeypatch.setattr(run.TeacherWalk, "observe", note)
    assert resume(supernet_directory, texts, tmp_path / "run") == list(LAYERS)
    assert observed == list(LAYERS)[layer + 1 :]
    assert same_result(tmp_path / "run", reference)


@pytest.mark.parametrize("what", ["gearshift.convert.plan.copy_companions", "clear"])
def test_stopped_at_the_very_end(
    what: str,
    supernet_directory: Path,
    texts: Path,
    reference: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
):
    with monkeypatch.context() as patch:
        if what == "clear":
            patch.setattr(CalibrationDirectory, "clear", stop)
        else:
            patch.setattr(what, stop)
        with pytest.raises(Stopped):
            go(supernet_directory, texts, tmp_path / "run")
    monkeypatch.setattr(run.TeacherWalk, "observe", lambda *_: pytest.fail("a layer was done again"))
    resume(supernet_directory, texts, tmp_path / "run")
    assert same_result(tmp_path / "run", reference)
    assert not (tmp_path / "run" / "work").exists()


RUN_SLOWLY = """
import sys, time
from gearshift.train.calibrate import CalibrationSettings, calibrate, fit
take_steps = fit.take_steps
def slowly(*arguments):
    time.sleep(0.2)
    return take_steps(*arguments)
fit.take_steps = slowly
settings = CalibrationSettings(**eval(sys.argv[4]))
calibrate(*sys.argv[1:4], settings, device="cpu", progress=False)
"""


def test_kill_and_resume_gives_the_same_bits(
    supernet_directory: Path, texts: Path, reference: Path, tmp_path: Path
):
    """A process is really killed, somewhere in its second or third layer."""
    torch.set_num_threads(1)
    out = tmp_path / "run"
    arguments = [str(supernet_directory), str(texts), str(out), repr(vars(RUN_SETTINGS))]
    process = subprocess.Popen(
        [sys.executable, "-c", RUN_SLOWLY, *arguments],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
        stderr=subprocess.DEVNULL,
    )
    deadline = time.monotonic() + 120
    while process.poll() is None and not (out / "work" / "layer-00000").exists():
        assert time.monotonic() < deadline, "no layer was finished"
        time.sleep(0.02)
    process.kill()
    assert process.wait() == -signal.SIGKILL
    assert not (out / "supernet").exists()
    assert resume(supernet_directory, texts, out) == list(LAYERS)
    assert same_result(out, reference)


def test_resuming_what_is_not_there_starts_it(
    supernet_directory: Path, texts: Path, reference: Path, tmp_path: Path
):
    assert resume(supernet_directory, texts, tmp_path / "run") == list(LAYERS)
    assert same_result(tmp_path / "run", reference)


def test_a_finished_calibration_is_left_alone(
    supernet_directory: Path, texts: Path, reference: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(run, "_Run", lambda *_: pytest.fail("something was done again"))
    assert go(supernet_directory, texts, reference, resume=True) == reference / "supernet"
    with pytest.raises(OutputExistsError, match="go on with --resume, or give a new path"):
        go(supernet_directory, texts, reference)


@pytest.fixture
def interrupted(supernet_directory: Path, texts: Path, tmp_path: Path) -> Path:
    """A calibration of which two layers are finished."""

    def shown(rows: Sequence[dict[str, Any]]) -> None:
        if rows[0]["layer"] == 1:
            raise Stopped

    with pytest.raises(Stopped):
        go(supernet_directory, texts, tmp_path / "run", layer_done=shown)
    return tmp_path / "run"


def test_other_settings_cannot_resume(supernet_directory: Path, texts: Path, interrupted: Path):
    before = contents(interrupted)
    for changes, told in (({"steps": 6}, "steps: was 5, now 6"), ({"seed": 9}, "seed: was 3, now 9")):
        settings = tiny_settings(**{"tokens": RUN_SETTINGS.tokens, "steps": 5} | changes)
        with pytest.raises(CalibrationError, match=f"was made otherwise .{told}"):
            go(supernet_directory, texts, interrupted, settings, resume=True)
    with pytest.raises(CalibrationError, match="tokens: was 720, now 480; data: was of digest"):
        go(supernet_directory, texts, interrupted, tiny_settings(tokens=480, steps=5), resume=True)
    assert contents(interrupted) == before


def test_another_supernet_cannot_resume(reference: Path, texts: Path, interrupted: Path):
    with pytest.raises(CalibrationError, match=r"otherwise \(supernet: was of digest [0-9a-f]{16}, now"):
        go(reference / "supernet", texts, interrupted, resume=True)


def test_other_data_cannot_resume(supernet_directory: Path, tmp_path: Path, interrupted: Path):
    (tmp_path / "other.txt").write_text("something else " * 300)
    with pytest.raises(CalibrationError, match=r"otherwise \(data: was of digest [0-9a-f]{12}, now"):
        go(supernet_directory, tmp_path / "other.txt", interrupted, resume=True)


def test_the_same_data_elsewhere_can(
    supernet_directory: Path, texts: Path, tmp_path: Path, interrupted: Path, reference: Path
):
    moved = shutil.copytree(supernet_directory, tmp_path / "moved")
    resume(moved, Path(shutil.copy(texts, tmp_path)), interrupted)
    assert same_result(interrupted, reference)


def test_truncated_hidden_states_are_named(supernet_directory: Path, texts: Path, interrupted: Path):
    path = interrupted / "work" / "hidden-00002.bin"
    path.write_bytes(path.read_bytes()[:-4])
    with pytest.raises(CalibrationError, match=r"hidden-00002.bin has 92156 bytes; expected 92160 bytes"):
        go(supernet_directory, texts, interrupted, resume=True)
    path.unlink()
    with pytest.raises(CalibrationError, match=f"is missing.*: remove {interrupted} and start again"):
        go(supernet_directory, texts, interrupted, resume=True)


def test_a_damaged_layer_is_named_and_its_advice_helps(
    supernet_directory: Path, texts: Path, interrupted: Path, reference: Path
):
    path = interrupted / "work" / "layer-00001" / "mixers.safetensors"
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(CalibrationError, match=f"remove {interrupted / 'work'} and go on with --resume"):
        go(supernet_directory, texts, interrupted, resume=True)
    assert not (interrupted / "supernet").exists()
    shutil.rmtree(interrupted / "work")
    assert resume(supernet_directory, texts, interrupted) == list(LAYERS)
    assert same_result(interrupted, reference)

from __future__ import annotations

import errno
import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from gearshift.errors import GearshiftError
from gearshift.train import checkpoint
from gearshift.train.checkpoint import (
    TrainingState,
    TrainingStateError,
    latest_training_state,
    load_training_tensors,
    read_training_state,
    save_training_state,
)

STATE = TrainingState(step=3, tokens=96, recipe={"steps": 9}, supernet="abc", data="def")


def make(seed: int = 0, steps: int = 3) -> tuple[dict[str, nn.Parameter], torch.optim.AdamW]:
    """Three parameters, one of which never gets a gradient."""
    torch.manual_seed(seed)
    trained = {
        name: nn.Parameter(torch.randn(shape)) for name, shape in (("a", (4, 3)), ("b", (5,)), ("idle", (2,)))
    }
    optimizer = torch.optim.AdamW(trained.values(), lr=0.1, fused=True)
    for _ in range(steps):
        advance(trained, optimizer)
    return trained, optimizer


def advance(trained: dict[str, nn.Parameter], optimizer: torch.optim.AdamW) -> None:
    optimizer.zero_grad(set_to_none=True)
    (trained["a"].cos().sum() + trained["b"].cos().sum()).backward()
    optimizer.step()


@pytest.fixture
def saved(tmp_path):
    trained, optimizer = make()
    return save_training_state(tmp_path / "checkpoint", STATE, trained, optimizer)


def test_a_loaded_state_goes_on_bit_for_bit(tmp_path):
    trained, optimizer = make()
    path = save_training_state(tmp_path, STATE, trained, optimizer)
    other, other_optimizer = make(seed=1, steps=0)
    load_training_tensors(path, other, other_optimizer)
    assert read_training_state(path) == STATE
    for _ in range(2):
        advance(trained, optimizer)
        advance(other, other_optimizer)
    assert all(torch.equal(trained[name], other[name]) for name in trained)
    assert other["idle"] not in other_optimizer.state


def test_only_the_newest_state_and_no_leftovers_stay(saved):
    leftover = saved.with_name(".step-00000002.abc.partial")
    leftover.mkdir()
    newer = save_training_state(saved.parent, TrainingState(7, 1, {}, "", ""), *make())
    assert list(saved.parent.iterdir()) == [newer]
    assert latest_training_state(saved.parent) == newer


def test_leftovers_of_a_killed_process_are_never_taken_for_a_state(tmp_path):
    assert latest_training_state(tmp_path / "nowhere") is None
    (tmp_path / ".step-00000009.abc.partial").mkdir()
    assert latest_training_state(tmp_path) is None


def test_the_newest_is_chosen_by_number(tmp_path):
    for name in ("step-00000100", "step-123456789", "step-00000020"):
        (tmp_path / name).mkdir()
    assert latest_training_state(tmp_path) == tmp_path / "step-123456789"


@pytest.mark.parametrize("writer", ["save_file", "write_json"])
def test_a_full_disk_leaves_the_last_good_state(saved, monkeypatch, writer):
    def full(*args, **kwargs):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(checkpoint, writer, full)
    newer = TrainingState(4, 1, {}, "", "")
    with pytest.raises(TrainingStateError, match=r"No space left.*step-00000003, is intact.*--resume"):
        save_training_state(saved.parent, newer, *make(seed=1))
    assert list(saved.parent.iterdir()) == [saved]
    load_training_tensors(saved, *make(seed=2))


def refused(path, trained, optimizer) -> str:
    """The refusal; nothing may have changed."""
    before = {name: parameter.clone() for name, parameter in trained.items()}
    with pytest.raises(GearshiftError) as caught:
        read_training_state(path)
        load_training_tensors(path, trained, optimizer)
    assert all(torch.equal(before[name], trained[name]) for name in trained)
    return str(caught.value)


@pytest.mark.parametrize("kept", [0, 4, 100, -1])
def test_a_truncated_file_is_refused(saved, kept):
    file = saved / "training.safetensors"
    file.write_bytes(file.read_bytes()[:kept])
    assert "training.safetensors cannot be read" in refused(saved, *make(seed=1))


@pytest.mark.parametrize("name", ["training.safetensors", "state.json"])
def test_a_missing_file_is_named(saved, name):
    (saved / name).unlink()
    assert name in refused(saved, *make(seed=1))


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"step": 1', '{"format": "other"}'])
def test_a_damaged_description_is_refused(saved, text):
    (saved / "state.json").write_text(text)
    assert "state.json" in refused(saved, *make(seed=1))


@pytest.mark.parametrize(
    ("key", "value"),
    [("format", "gearshift-training-9"), ("step", -1), ("step", "3"), ("tokens", 0.5), ("new", 1)],
)
def test_a_description_with_a_wrong_value_is_refused(saved, key, value):
    row = json.loads((saved / "state.json").read_text()) | {key: value}
    (saved / "state.json").write_text(json.dumps(row))
    assert key in refused(saved, *make(seed=1))


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda t: t.pop("weight/a"), "lacks 'weight/a'"),
        (lambda t: t.pop("exp_avg_sq/b"), "lacks 'exp_avg_sq/b'"),
        (lambda t: t.update({"weight/c": torch.zeros(1)}), "holds 'weight/c'"),
        (lambda t: t.update({"exp_avg/idle": torch.zeros(2)}), "holds 'exp_avg/idle'"),
        (lambda t: t.update({"weight/b": torch.zeros(6)}), "of shape (6,), expected (5,)"),
        (lambda t: t.update({"exp_avg/a": torch.zeros(3, 4)}), "of shape (3, 4), expected (4, 3)"),
    ],
)
def test_tensors_of_another_run_are_refused(saved, change, told):
    tensors = load_file(saved / "training.safetensors")
    change(tensors)
    save_file(tensors, saved / "training.safetensors")
    assert told in refused(saved, *make(seed=1))


def test_another_format_in_the_place_of_tensors_is_refused(saved):
    shutil.copyfile(saved / "state.json", saved / "training.safetensors")
    assert "cannot be read" in refused(saved, *make(seed=1))

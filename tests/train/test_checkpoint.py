"""States on disk: a round trip, and everything that can be wrong with them. Runs are in ``test_run``."""

from __future__ import annotations

import errno
import json
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from gearshift.train import checkpoint
from gearshift.train.checkpoint import (
    Saver,
    TrainingState,
    TrainingStateError,
    check_parts,
    load_data_state,
    load_training_tensors,
    read_training_state,
    training_states,
)
from gearshift.train.distributed import Group

ALONE = Group(0, 1, torch.device("cpu"))
STATE = TrainingState(step=3, tokens=96, recipe={"seed": 9}, supernet="abc", data=["def"])
LANES = {"0": {"sources": [{"place": 3}], "taken": [5], "current": None}}


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


def save(folder, state, trained, optimizer, keep: int = 1):
    saver = Saver(folder, ALONE, keep)
    saver.save(state, trained, optimizer, LANES)
    saver.finish()
    saver.close()
    return training_states(folder)[0]


def load(path, trained, optimizer):
    load_training_tensors(path, read_training_state(path), trained, optimizer, ALONE)


@pytest.fixture
def saved(tmp_path):
    return save(tmp_path / "checkpoint", STATE, *make())


def test_a_loaded_state_goes_on_bit_for_bit(tmp_path):
    trained, optimizer = make()
    path = save(tmp_path, STATE, trained, optimizer)
    other, other_optimizer = make(seed=1, steps=0)
    load(path, other, other_optimizer)
    assert read_training_state(path) == STATE
    assert load_data_state(path, STATE) == LANES
    for _ in range(2):
        advance(trained, optimizer)
        advance(other, other_optimizer)
    assert all(torch.equal(trained[name], other[name]) for name in trained)
    assert other["idle"] not in other_optimizer.state


def test_a_state_is_of_the_moment_when_it_was_asked_for(tmp_path, monkeypatch):
    """Weights go on moving while it is written."""
    trained, optimizer = make()
    before = {name: p.detach().clone() for name, p in trained.items()}
    saver = Saver(tmp_path, ALONE)
    saver.save(STATE, trained, optimizer, LANES)
    advance(trained, optimizer)
    saver.finish()
    saver.close()
    other, other_optimizer = make(seed=1, steps=0)
    load(training_states(tmp_path)[0], other, other_optimizer)
    assert all(torch.equal(before[name], other[name]) for name in trained)


def test_nothing_has_a_name_before_it_is_whole(tmp_path, monkeypatch):
    import threading

    go, write = threading.Event(), checkpoint.save_file
    monkeypatch.setattr(checkpoint, "save_file", lambda *given: go.wait() and write(*given))
    saver = Saver(tmp_path, ALONE)
    saver.save(STATE, *make(), LANES)
    saver.poll()
    assert training_states(tmp_path) == []
    go.set()
    saver.finish()
    saver.close()
    assert [path.name for path in training_states(tmp_path)] == ["step-00000003"]


def test_only_the_newest_states_and_no_leftovers_stay(saved):
    leftover = saved.with_name(".step-00000002.partial")
    leftover.mkdir()
    for step in (7, 9, 11):
        save(saved.parent, replace(STATE, step=step), *make(), keep=2)
    assert sorted(path.name for path in saved.parent.iterdir()) == ["step-00000009", "step-00000011"]


def test_leftovers_of_a_killed_process_are_never_taken_for_a_state(tmp_path):
    assert training_states(tmp_path / "nowhere") == []
    (tmp_path / ".step-00000009.partial").mkdir()
    assert training_states(tmp_path) == []


def test_the_newest_is_chosen_by_number(tmp_path):
    for name in ("step-00000100", "step-123456789", "step-00000020"):
        (tmp_path / name).mkdir()
    assert [path.name for path in training_states(tmp_path)][:2] == ["step-123456789", "step-00000100"]


@pytest.mark.parametrize("writer", ["save_file", "write_json"])
def test_a_full_disk_leaves_the_last_good_state(saved, monkeypatch, writer):
    def full(*args, **kwargs):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(checkpoint, writer, full)
    with pytest.raises(
        TrainingStateError, match=r"step 4 .*No space left.*step-00000003, is intact.*--resume"
    ):
        save(saved.parent, replace(STATE, step=4), *make(seed=1))
    assert list(saved.parent.iterdir()) == [saved]
    load(saved, *make(seed=2))


def refused(path, trained, optimizer) -> str:
    """The refusal; nothing may have changed."""
    before = {name: parameter.clone() for name, parameter in trained.items()}
    with pytest.raises(TrainingStateError) as caught:
        load(path, trained, optimizer)
    assert all(torch.equal(before[name], trained[name]) for name in trained)
    return str(caught.value)


@pytest.mark.parametrize("kept", [0, 4, 100, -1])
def test_a_truncated_file_is_refused(saved, kept):
    file = saved / "rank-00000.safetensors"
    file.write_bytes(file.read_bytes()[:kept])
    assert "rank-00000.safetensors cannot be read" in refused(saved, *make(seed=1))
    assert "cut short or damaged" in (check_parts(saved, STATE, ALONE) or "")


@pytest.mark.parametrize("name", ["rank-00000.safetensors", "rank-00000.json", "state.json"])
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
        (lambda t: t.pop("weight/a"), "lacks rows of 'weight/a' from 0"),
        (lambda t: t.pop("exp_avg_sq/b"), "lacks rows of 'exp_avg_sq/b'"),
        (lambda t: t.update({"weight/b": torch.zeros(6)}), "lacks rows of 'weight/b'"),
        (lambda t: t.update({"exp_avg/a": torch.zeros(3, 4)}), "lacks rows of 'exp_avg/a'"),
    ],
)
def test_tensors_of_another_run_are_refused(saved, change, told):
    tensors = load_file(saved / "rank-00000.safetensors")
    change(tensors)
    save_file(tensors, saved / "rank-00000.safetensors")
    assert told in refused(saved, *make(seed=1))


def test_parameters_of_another_run_are_refused(saved):
    trained, optimizer = make(seed=1)
    fewer = {name: trained[name] for name in ("a", "b")}
    assert "holds 'idle' and 0 more that are not trained" in refused(saved, fewer, optimizer)
    more = trained | {"c": nn.Parameter(torch.zeros(2))}
    assert "lacks 'c' and 0 more" in refused(saved, more, optimizer)
    other = trained | {"b": nn.Parameter(torch.zeros(6))}
    assert "holds 'weight/b' of shape (5,), expected (6,)" in refused(saved, other, optimizer)


@pytest.mark.parametrize("ranks", [2, 3, 4])
def test_rows_of_several_processes_are_put_together(saved, tmp_path, ranks):
    """What processes would have written, each its rows, is one state."""
    tensors = load_file(saved / "rank-00000.safetensors")
    parts = json.loads((saved / "rank-00000.json").read_text())["parts"]
    split = tmp_path / "step-00000003"
    split.mkdir()
    state = replace(STATE, ranks=ranks)
    for rank in range(ranks):
        own, rows = {}, {}
        for name, (_, count, shape) in parts.items():
            each = -(-count // ranks)
            start = min(rank * each, count)
            rows[name] = [start, min(each, count - start), shape]
            for kind in ("weight", "exp_avg", "exp_avg_sq"):
                if f"{kind}/{name}" in tensors and rows[name][1]:
                    own[f"{kind}/{name}"] = tensors[f"{kind}/{name}"][start : start + each].clone()
            if f"step/{name}" in tensors:
                own[f"step/{name}"] = tensors[f"step/{name}"]
        save_file(own, split / f"rank-{rank:05d}.safetensors")
        described = {"parts": rows, "lanes": {str(rank): rank}}
        (split / f"rank-{rank:05d}.json").write_text(json.dumps(described))
    one, other = make(seed=1), make(seed=2)
    load(saved, *one)
    load_training_tensors(split, state, *other, ALONE)
    assert all(torch.equal(one[0][name], other[0][name]) for name in parts)
    assert load_data_state(split, state) == {str(rank): rank for rank in range(ranks)}
    (split / "rank-00001.safetensors").unlink()
    with pytest.raises(TrainingStateError, match=r"rank-00001.safetensors cannot be read"):
        load_training_tensors(split, state, *other, ALONE)

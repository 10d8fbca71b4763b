"""Runs: what they write, how they end, and how they go on."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import threading
from pathlib import Path

import pytest
import torch

from gearshift.errors import GearshiftError, OutputExistsError
from gearshift.supernet import CheckpointError, load_supernet
from gearshift.train import checkpoint, passes, trainer
from gearshift.train import run as run_module
from gearshift.train.checkpoint import training_states
from gearshift.train.device import DeviceError
from gearshift.train.documents import DataError
from gearshift.train.recipe_file import load_recipe
from gearshift.train.run import train as run
from gearshift.train.setup import RunError
from gearshift.train.tokens import TokenizerError
from gearshift.train.trainer import DivergedError
from tests.train.tools import losses, rows, same_weights


def last_checkpoint(root: Path) -> str | None:
    return next((path.name for path in training_states(root / "checkpoint")), None)


@pytest.fixture
def reference(make_recipe, tmp_path) -> Path:
    """An uninterrupted run of six steps."""
    run(make_recipe(out=tmp_path / "reference"), progress=False)
    return tmp_path / "reference"


@pytest.fixture
def interrupt_after(monkeypatch):
    """Let something happen inside a step, before its weights move."""

    def at(step: int, action) -> None:
        take_step = trainer.Trainer.train_step

        def train_step(self, number, batches):
            if number == step:
                action()
            return take_step(self, number, batches)

        monkeypatch.setattr(trainer.Trainer, "train_step", train_step)

    return at


def test_a_run_writes_what_it_promises(reference, supernet_directory):
    assert {path.name for path in reference.iterdir()} == {
        "recipe.yaml",
        "provenance.json",
        "metrics.jsonl",
        "checkpoint",
        "supernet",
    }
    assert load_recipe(reference / "recipe.yaml").steps == 6
    assert [row["step"] for row in rows(reference)] == [1, 2, 3, 4, 5, 6]
    assert rows(reference)[-1]["tokens"] == 6 * 2 * 24
    assert rows(reference)[0]["tokens_per_second"] > 0
    assert (reference / "supernet" / "tokenizer.json").is_file()
    assert last_checkpoint(reference) == "step-00000006"


def test_the_teacher_stays_what_it_was(reference, supernet_directory):
    before, after = load_supernet(supernet_directory), load_supernet(reference / "supernet")
    ids = torch.arange(40)[None]
    with torch.no_grad():
        assert torch.equal(before(ids, placement="fa*3").logits, after(ids, placement="fa*3").logits)
        assert not torch.equal(before(ids, placement="gdn*3").logits, after(ids, placement="gdn*3").logits)


def test_the_same_recipe_gives_the_same_bits(reference, make_recipe, tmp_path):
    run(make_recipe(out=tmp_path / "again"), progress=False)
    assert losses(tmp_path / "again") == losses(reference)
    assert same_weights(tmp_path / "again", reference)


def test_another_seed_gives_another_run(reference, make_recipe, tmp_path):
    run(make_recipe(out=tmp_path / "again", seed=6), progress=False)
    assert losses(tmp_path / "again")[0] != losses(reference)[0]


@pytest.mark.parametrize("step", [1, 4, 5, 6])
def test_an_exception_in_the_middle_then_resume_gives_the_same_bits(
    make_recipe, reference, interrupt_after, monkeypatch, step
):
    def stop():
        raise KeyboardInterrupt

    with monkeypatch.context():
        interrupt_after(step, stop)
        with pytest.raises(KeyboardInterrupt):
            run(make_recipe(), progress=False)
    monkeypatch.undo()
    run(make_recipe(), resume=True, progress=False)
    assert losses(make_recipe().out) == losses(reference)
    assert same_weights(make_recipe().out, reference)


def test_ctrl_c_ends_the_step_saves_and_interrupts(
    make_recipe, reference, interrupt_after, monkeypatch, capsys
):
    before = signal.getsignal(signal.SIGINT)
    interrupt_after(3, lambda: os.kill(os.getpid(), signal.SIGINT))
    with pytest.raises(KeyboardInterrupt):
        run(make_recipe(), progress=False)
    root = make_recipe().out
    assert [row["step"] for row in rows(root)] == [1, 2, 3]
    assert last_checkpoint(root) == "step-00000003"
    assert "stopping after this step" in capsys.readouterr().err
    assert signal.getsignal(signal.SIGINT) == before
    monkeypatch.undo()
    run(make_recipe(), resume=True, progress=False)
    assert losses(root) == losses(reference)


def test_a_second_ctrl_c_stops_at_once(make_recipe, interrupt_after):
    def twice():
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)

    interrupt_after(4, twice)
    with pytest.raises(KeyboardInterrupt):
        run(make_recipe(), progress=False)
    assert last_checkpoint(make_recipe().out) == "step-00000002"


def test_a_run_works_outside_the_main_thread(make_recipe):
    done = []
    thread = threading.Thread(target=lambda: done.append(run(make_recipe(steps=1), progress=False)))
    thread.start()
    thread.join()
    assert done == [make_recipe().out / "supernet"]


def test_rows_after_the_checkpoint_are_written_again(make_recipe, reference, interrupt_after, monkeypatch):
    def stop():
        raise KeyboardInterrupt

    interrupt_after(6, stop)
    with pytest.raises(KeyboardInterrupt):
        run(make_recipe(), progress=False)
    root = make_recipe().out
    with (root / "metrics.jsonl").open("a") as file:
        file.write('{"step": 6, "loss": 0.')
    monkeypatch.undo()
    run(make_recipe(), resume=True, progress=False)
    assert losses(root) == losses(reference)


def test_a_finished_run_is_left_alone(reference, make_recipe, monkeypatch):
    monkeypatch.setattr(run_module, "make_trainer", lambda *args: pytest.fail("loaded again"))
    assert run(make_recipe(out=reference), resume=True, progress=False) == reference / "supernet"


def test_an_existing_run_is_not_overwritten(reference, make_recipe):
    with pytest.raises(OutputExistsError, match="--resume"):
        run(make_recipe(out=reference), progress=False)


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"seed": 9}, "seed: was 5, now 9"),
        ({"steps": 12}, "stages.0.steps: was 6, now 12"),
        ({"losses": {"forward_kl": 3}}, "stages.0.losses.forward_kl: was 1.0, now 3.0"),
    ],
)
def test_another_recipe_cannot_resume(make_recipe, interrupted, changes, told):
    with pytest.raises(RunError, match=told):
        run(make_recipe(**changes), resume=True, progress=False)


@pytest.fixture
def interrupted(make_recipe, monkeypatch) -> Path:
    """A run that stopped in step 3, with a checkpoint of step 2."""
    take_step = trainer.Trainer.train_step

    def train_step(self, step, batches):
        if step == 3:
            raise KeyboardInterrupt
        return take_step(self, step, batches)

    with monkeypatch.context() as patch:
        patch.setattr(trainer.Trainer, "train_step", train_step)
        with pytest.raises(KeyboardInterrupt):
            run(make_recipe(), progress=False)
    return make_recipe().out


def test_a_resumed_run_takes_only_the_missing_steps(make_recipe, interrupted, monkeypatch):
    taken, take = [], trainer.Trainer.train_step
    monkeypatch.setattr(
        trainer.Trainer,
        "train_step",
        lambda self, step, own: taken.append(step) or take(self, step, own),
    )
    run(make_recipe(), resume=True, progress=False)
    assert taken == [3, 4, 5, 6]


def test_other_data_cannot_resume(make_recipe, interrupted, tmp_path):
    (tmp_path / "other.txt").write_text("something else " * 50)
    with pytest.raises(RunError, match="another data"):
        run(make_recipe(data=[tmp_path / "other.txt"]), resume=True, progress=False)


def test_another_supernet_cannot_resume(make_recipe, interrupted, reference):
    with pytest.raises(RunError, match="another supernet"):
        run(make_recipe(supernet=reference / "supernet"), resume=True, progress=False)


def test_the_only_checkpoint_being_damaged_is_told(make_recipe, interrupted, capsys):
    file = interrupted / "checkpoint" / "step-00000002" / "rank-00000.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(GearshiftError, match=r"no checkpoint in .* is whole .*rank-00000.safetensors is cut"):
        run(make_recipe(), resume=True, progress=False)


DAMAGES = {
    "a byte that changed": lambda file: file.write_bytes(flip(file.read_bytes(), -5)),
    "a file cut short": lambda file: file.write_bytes(file.read_bytes()[:-100]),
    "a missing shard": lambda file: file.unlink(),
    "a missing description": lambda file: file.with_suffix(".json").unlink(),
    "a broken description": lambda file: file.with_suffix(".json").write_text("{"),
    "a missing state": lambda file: (file.parent / "state.json").unlink(),
}


def flip(content: bytes, place: int) -> bytes:
    changed = bytearray(content)
    changed[place] ^= 1
    return bytes(changed)


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_a_damaged_checkpoint_is_told_and_the_good_one_before_it_is_taken(
    make_recipe, reference, interrupt_after, monkeypatch, capsys, damage
):
    def stop():
        raise KeyboardInterrupt

    with monkeypatch.context():
        interrupt_after(6, stop)
        with pytest.raises(KeyboardInterrupt):
            run(make_recipe(), progress=False)
    monkeypatch.undo()
    root = make_recipe().out
    assert [path.name for path in training_states(root / "checkpoint")] == ["step-00000004", "step-00000002"]
    damage(root / "checkpoint" / "step-00000004" / "rank-00000.safetensors")
    run(make_recipe(), resume=True, progress=False)
    said = capsys.readouterr().err
    assert "this checkpoint is passed over" in said
    assert "step-00000004" in said
    assert losses(root) == losses(reference)
    assert same_weights(root, reference)


def test_a_full_disk_leaves_the_last_good_checkpoint(make_recipe, reference, monkeypatch):
    write = checkpoint.save_file

    def full(tensors, path):
        if "step-00000004" in str(path):
            raise OSError(errno.ENOSPC, "No space left on device")
        write(tensors, path)

    monkeypatch.setattr(checkpoint, "save_file", full)
    with pytest.raises(GearshiftError, match=r"step 4 .*No space left on device.*step-00000002, is intact"):
        run(make_recipe(), progress=False)
    monkeypatch.undo()
    run(make_recipe(), resume=True, progress=False)
    assert losses(make_recipe().out) == losses(reference)


def test_a_full_disk_at_the_very_end_leaves_no_supernet(make_recipe, monkeypatch):
    def full(*args, **kwargs):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("gearshift.supernet.shards.ShardWriter.write", full)
        with pytest.raises(CheckpointError, match="no space left"):
            run(make_recipe(), progress=False)
    assert not (make_recipe().out / "supernet").exists()
    assert run(make_recipe(), resume=True, progress=False).is_dir()


def test_divergence_leaves_the_last_good_checkpoint(make_recipe, monkeypatch):
    good, calls = passes.head_losses, []

    def poisoned(*args, **kwargs):
        loss, terms = good(*args, **kwargs)
        calls.append(1)
        return loss * (float("nan") if len(calls) == 6 else 1.0), terms

    monkeypatch.setattr(passes, "head_losses", poisoned)
    with pytest.raises(DivergedError, match="step 6"):
        run(make_recipe(), progress=False)
    root = make_recipe().out
    assert last_checkpoint(root) == "step-00000004"
    assert not (root / "supernet").exists()


@pytest.mark.parametrize(
    ("changes", "error", "told"),
    [
        ({"supernet": "nowhere"}, CheckpointError, "no supernet at nowhere"),
        ({"data": ["nowhere.jsonl"]}, DataError, "nowhere.jsonl does not exist"),
        (
            {"sequence_length": 129},
            RunError,
            "sequence_length is 129 in the stage distill; the teacher was made for 128",
        ),
    ],
)
def test_what_cannot_work_is_refused_before_anything_is_written(make_recipe, changes, error, told):
    with pytest.raises(error, match=told):
        run(make_recipe(**changes), progress=False)
    assert not make_recipe().out.exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_a_missing_gpu_is_named(make_recipe):
    with pytest.raises(DeviceError, match="torch finds no GPU"):
        run(make_recipe(device="cuda"), progress=False)


def test_progress_names_loss_speed_and_time_left(make_recipe, capsys):
    run(make_recipe())
    shown = capsys.readouterr().err
    assert "train 1/6  distill  loss " in shown
    assert "tokens/s" in shown
    assert "train 6/6" in shown
    assert "0:00:00 left" in shown


def test_the_smoke_recipe_runs(supernet_directory, texts, tmp_path):
    recipe = Path(__file__).parents[2] / "recipes" / "smoke.yaml"
    changes = [f"supernet={supernet_directory}", f"out={tmp_path / 'run'}", f"data=[{texts}]"]
    assert run(load_recipe(recipe, changes), progress=False).is_dir()
    assert {row["stage"] for row in rows(tmp_path / "run")} == {"align", "distill"}


def test_a_data_file_that_changes_during_the_run_stops_it(make_recipe, texts, tmp_path, interrupt_after):
    copy = tmp_path / "copy.jsonl"
    copy.write_bytes(texts.read_bytes())
    interrupt_after(3, lambda: copy.write_bytes(texts.read_bytes() * 2))
    with pytest.raises(DataError, match=r"copy.jsonl has changed since the run began; bring back the file"):
        run(make_recipe(data=[copy], steps=20), progress=False)
    root = make_recipe().out
    saved = last_checkpoint(root)
    assert saved is not None
    assert 2 <= int(saved.removeprefix("step-")) <= len(rows(root)) < 20
    copy.write_bytes(texts.read_bytes())
    with pytest.raises(RunError, match="another data"):
        copy.write_bytes(texts.read_bytes() * 2)
        run(make_recipe(data=[copy], steps=20), resume=True, progress=False)


def test_a_tokenizer_of_another_vocabulary_is_refused(make_recipe, supernet_directory, tmp_path):
    supernet = shutil.copytree(supernet_directory, tmp_path / "other")
    tokenizer = json.loads((supernet / "tokenizer.json").read_text())
    tokenizer["model"]["vocab"]["more"] = 257
    (supernet / "tokenizer.json").write_text(json.dumps(tokenizer))
    with pytest.raises(TokenizerError, match="has tokens up to 257, but the model knows 257; copy the"):
        run(make_recipe(supernet=supernet), progress=False)
    with pytest.raises(RunError, match="have different vocabularies"):
        run(make_recipe(teacher=supernet), progress=False)
    assert not make_recipe().out.exists()


def test_another_teacher_teaches(make_recipe, reference, supernet_directory):
    """The trained supernet's full attention is still its own teacher's, so it teaches the same."""
    run(make_recipe(teacher=supernet_directory, losses={"activation": 0}), progress=False)
    run(make_recipe(out=reference.with_name("alone"), losses={"activation": 0}), progress=False)
    assert losses(make_recipe().out) == losses(reference.with_name("alone"))

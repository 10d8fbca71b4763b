from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch

from gearshift.errors import GearshiftError, OutputExistsError
from gearshift.files import read_json_lines
from gearshift.supernet import CheckpointError, load_supernet
from gearshift.train import checkpoint, distill, trainer
from gearshift.train.data import DataError
from gearshift.train.device import DeviceError
from gearshift.train.distill import RunError
from gearshift.train.recipe import load_recipe, write_recipe
from gearshift.train.trainer import DivergedError

run = distill.distill


def rows(root: Path) -> list[dict]:
    return read_json_lines(root / "metrics.jsonl")


def losses(root: Path) -> list[tuple]:
    """Everything of a run that must repeat bit for bit."""
    keys = (
        "step",
        "loss",
        "forward_kl",
        "activation",
        "gradient_norm",
        "learning_rate",
        "tokens",
        "placements",
    )
    return [tuple(map(str, (row[key] for key in keys))) for row in rows(root)]


def last_checkpoint(root: Path) -> str | None:
    path = checkpoint.latest_training_state(root / "checkpoint")
    return path and path.name


def supernet_weights(root: Path) -> dict[str, torch.Tensor]:
    return load_supernet(root / "supernet").state_dict()


def same_weights(first: Path, second: Path) -> bool:
    one, other = supernet_weights(first), supernet_weights(second)
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


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

        def train_step(self, number):
            if number == step:
                action()
            return take_step(self, number)

        monkeypatch.setattr(trainer.Trainer, "train_step", train_step)

    return at


def test_a_run_writes_what_it_promises(reference, supernet_directory):
    assert {path.name for path in reference.iterdir()} == {
        "recipe.yaml",
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


RUN_SLOWLY = """
import sys, time
from pathlib import Path
from gearshift.train import trainer
from gearshift.train.distill import distill
from gearshift.train.recipe import load_recipe
take_step = trainer.Trainer.train_step
def slow_step(self, step):
    time.sleep(0.05)
    return take_step(self, step)
trainer.Trainer.train_step = slow_step
distill(load_recipe(Path(sys.argv[1])), resume=True, progress=False)
"""


def start_slowly(path: Path) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-c", RUN_SLOWLY, str(path)],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
        stderr=subprocess.DEVNULL,
    )


def wait_for_rows(process: subprocess.Popen, root: Path, count: int) -> None:
    for _ in range(600):
        if process.poll() is not None:
            return
        if (root / "metrics.jsonl").exists() and len(read_json_lines(root / "metrics.jsonl")) >= count:
            return
        time.sleep(0.05)


def test_kill_and_resume_gives_the_same_bits(make_recipe, tmp_path):
    """A process is really killed, somewhere between two checkpoints."""
    torch.set_num_threads(1)
    recipe = make_recipe(steps=10, save_every=3, align_steps=4)
    write_recipe(recipe, tmp_path / "recipe.yaml")
    process = start_slowly(tmp_path / "recipe.yaml")
    wait_for_rows(process, recipe.out, 5)
    process.kill()
    assert process.wait() == -signal.SIGKILL
    assert len(rows(recipe.out)) < 10
    run(recipe, resume=True, progress=False)
    run(make_recipe(steps=10, save_every=3, align_steps=4, out=tmp_path / "reference"), progress=False)
    assert losses(recipe.out) == losses(tmp_path / "reference")
    assert same_weights(recipe.out, tmp_path / "reference")


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
    monkeypatch.setattr(distill, "load_supernet", lambda *args, **kwargs: pytest.fail("loaded again"))
    assert run(make_recipe(out=reference), resume=True, progress=False) == reference / "supernet"


def test_an_existing_run_is_not_overwritten(reference, make_recipe):
    with pytest.raises(OutputExistsError, match="--resume"):
        run(make_recipe(out=reference), progress=False)


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"seed": 9}, "seed: was 5, now 9"),
        ({"steps": 12}, "steps: was 6, now 12"),
        ({"weights": {"forward_kl": 3}}, "weights: was"),
    ],
)
def test_another_recipe_cannot_resume(make_recipe, interrupted, changes, told):
    with pytest.raises(RunError, match=told):
        run(make_recipe(**changes), resume=True, progress=False)


@pytest.fixture
def interrupted(make_recipe, monkeypatch) -> Path:
    """A run that stopped in step 3, with a checkpoint of step 2."""
    take_step = trainer.Trainer.train_step

    def train_step(self, step):
        if step == 3:
            raise KeyboardInterrupt
        return take_step(self, step)

    with monkeypatch.context() as patch:
        patch.setattr(trainer.Trainer, "train_step", train_step)
        with pytest.raises(KeyboardInterrupt):
            run(make_recipe(), progress=False)
    return make_recipe().out


def test_a_resumed_run_takes_only_the_missing_steps(make_recipe, interrupted, monkeypatch):
    taken = []
    take_step = trainer.Trainer.train_step
    monkeypatch.setattr(
        trainer.Trainer, "train_step", lambda self, step: taken.append(step) or take_step(self, step)
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


def test_a_truncated_checkpoint_is_refused(make_recipe, interrupted):
    file = interrupted / "checkpoint" / "step-00000002" / "training.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(GearshiftError, match="cut short"):
        run(make_recipe(), resume=True, progress=False)


def test_a_full_disk_leaves_the_last_good_checkpoint(make_recipe, reference, monkeypatch):
    write = checkpoint.save_file

    def full(tensors, path):
        if "step-00000004" in str(path):
            raise OSError(errno.ENOSPC, "No space left on device")
        write(tensors, path)

    monkeypatch.setattr(checkpoint, "save_file", full)
    with pytest.raises(GearshiftError, match=r"No space left on device.*step-00000002, is intact"):
        run(make_recipe(), progress=False)
    monkeypatch.undo()
    run(make_recipe(), resume=True, progress=False)
    assert losses(make_recipe().out) == losses(reference)


def test_a_full_disk_at_the_very_end_leaves_no_supernet(make_recipe, monkeypatch):
    def full(*args, **kwargs):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("gearshift.supernet.modeling.SupernetForCausalLM.save_pretrained", full)
        with pytest.raises(CheckpointError, match="no space left"):
            run(make_recipe(), progress=False)
    assert not (make_recipe().out / "supernet").exists()
    assert run(make_recipe(), resume=True, progress=False).is_dir()


def test_divergence_leaves_the_last_good_checkpoint(make_recipe, monkeypatch):
    good = trainer.forward_kl

    def poisoned(*args):
        broken = last_checkpoint(make_recipe().out) == "step-00000004"
        return good(*args) * (float("nan") if broken else 1.0)

    monkeypatch.setattr(trainer, "forward_kl", poisoned)
    with pytest.raises(DivergedError, match="step 5"):
        run(make_recipe(), progress=False)
    root = make_recipe().out
    assert last_checkpoint(root) == "step-00000004"
    assert not (root / "supernet").exists()


@pytest.mark.parametrize(
    ("changes", "error", "told"),
    [
        ({"supernet": "nowhere"}, CheckpointError, "no supernet at nowhere"),
        ({"data": ["nowhere.jsonl"]}, DataError, "nowhere.jsonl does not exist"),
        ({"sequence_length": 129}, RunError, "sequence_length is 129; the teacher was made for 128"),
    ],
)
def test_what_cannot_work_is_refused_before_anything_is_written(make_recipe, changes, error, told):
    with pytest.raises(error, match=told):
        run(make_recipe(**changes), progress=False)
    assert not make_recipe().out.exists()


def test_too_little_data_is_refused_before_anything_is_written(make_recipe, tmp_path):
    (tmp_path / "short.txt").write_text("x")
    with pytest.raises(DataError, match="fewer than one sequence"):
        run(make_recipe(data=[tmp_path / "short.txt"]), progress=False)
    assert not make_recipe().out.exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_a_missing_gpu_is_named(make_recipe):
    with pytest.raises(DeviceError, match="torch finds no GPU"):
        run(make_recipe(device="cuda"), progress=False)


def test_progress_names_loss_speed_and_time_left(make_recipe, capsys):
    run(make_recipe())
    shown = capsys.readouterr().err
    assert "distil 1/6  distill  loss " in shown
    assert "tokens/s" in shown
    assert "distil 6/6" in shown
    assert "0:00:00 left" in shown


def test_the_smoke_recipe_runs(supernet_directory, texts, tmp_path):
    recipe = Path(__file__).parents[2] / "recipes" / "smoke.yaml"
    changes = [f"supernet={supernet_directory}", f"out={tmp_path / 'run'}", f"data=[{texts}]"]
    assert run(load_recipe(recipe, changes), progress=False).is_dir()
    assert {row["stage"] for row in rows(tmp_path / "run")} == {"align", "distill"}

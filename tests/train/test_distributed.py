"""``torchrun`` with two processes on a CPU: the same losses as one, and states that go both ways."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from gearshift.train.recipe import Recipe
from gearshift.train.recipe_file import write_recipe
from gearshift.train.run import train
from gearshift.train.stage_data import LayoutError, layout_of
from tests.train.tools import rows

SIZES = {"batch_size": 1, "micro_batches": 4, "sequence_length": 32}
STAGES = [
    {"stage": "align", "steps": 2, **SIZES},
    {
        "stage": "distill",
        "steps": 4,
        "losses": {"forward_kl": 1.0, "reverse_kl": 0.5, "cross_entropy": 0.1, "activation": 1.0},
        "weight_decay": 0.1,
        "learning_rate": 3e-3,
        **SIZES,
    },
]

RUN = """
import os, sys
from pathlib import Path
from gearshift.train import trainer
from gearshift.train.recipe_file import load_recipe
from gearshift.train.run import train
stop, die = int(sys.argv[2]), int(sys.argv[3])
take = trainer.Trainer.train_step
def step(self, number, batches):
    if number == die and self.group.rank == 1:
        os._exit(9)
    if number == stop:
        raise SystemExit(7)
    return take(self, number, batches)
trainer.Trainer.train_step = step
for path in sys.argv[1].split(","):
    train(load_recipe(Path(path)), resume=True, progress=False)
"""


def torchrun(folder: Path, *recipes: Recipe, stop: int = 0, die: int = 0) -> subprocess.CompletedProcess[str]:
    """Two processes that train these recipes one after another."""
    script = folder / "run.py"
    script.write_text(RUN)
    paths = []
    for number, recipe in enumerate(recipes):
        paths.append(folder / f"recipe-{number}.yaml")
        write_recipe(recipe, paths[-1])
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command += [str(script), ",".join(map(str, paths)), str(stop), str(die)]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=300)


def numbers(root: Path) -> list[dict[str, Any]]:
    keys = ("loss", "gradient_norm", "forward_kl", "activation")
    return [{key: row[key] for key in keys if key in row} for row in rows(root)]


def _known(values: dict[str, float | None]) -> dict[str, float]:
    return {name: value for name, value in values.items() if value is not None}


def same(first: Path, second: Path) -> None:
    one, other = rows(first), rows(second)
    assert [row["placements"] for row in one] == [row["placements"] for row in other]
    assert len(one) == len(other) == 6
    for mine, theirs in zip(numbers(first), numbers(second), strict=True):
        # The divergence of a random model is near 0: the difference of numbers near 5 nats in float32.
        assert mine == pytest.approx(theirs, rel=1e-5, abs=1e-7)
    for mine, theirs in zip(one, other, strict=True):
        for name, values in mine["mixers"].items():
            other_values = theirs["mixers"][name]
            assert [v is None for v in values.values()] == [v is None for v in other_values.values()]
            assert _known(values) == pytest.approx(_known(other_values), rel=1e-5)


def test_two_processes_train_as_one_and_states_go_both_ways(make_recipe, tmp_path, monkeypatch):
    def recipe(name: str, **changes: Any) -> Recipe:
        return make_recipe(out=tmp_path / name, stages=STAGES, save_every=1, **changes)

    train(recipe("one"), progress=False)
    attention = {"trained": "mixers_and_attention", "scale": {"activation_checkpointing": True}}
    done = torchrun(tmp_path, recipe("two"), recipe("attention", **attention))
    assert done.returncode == 0, done.stderr
    same(tmp_path / "two", tmp_path / "one")
    files = sorted(path.name for path in (tmp_path / "two" / "checkpoint" / "step-00000006").iterdir())
    assert [name for name in files if name.endswith("safetensors")] == [
        "rank-00000.safetensors",
        "rank-00001.safetensors",
    ]
    train(recipe("attention-alone", **attention), progress=False)
    same(tmp_path / "attention", tmp_path / "attention-alone")

    # A process dies in the fourth step: both end, and what was saved goes on alone.
    died = torchrun(tmp_path, recipe("two-then-one"), die=4)
    assert died.returncode != 0
    assert len(rows(tmp_path / "two-then-one")) < 6
    train(recipe("two-then-one"), resume=True, progress=False)
    same(tmp_path / "two-then-one", tmp_path / "one")

    from gearshift.train import trainer

    take = trainer.Trainer.train_step

    def step(self, number, batches):
        if number == 4:
            raise KeyboardInterrupt
        return take(self, number, batches)

    with monkeypatch.context() as patch:
        patch.setattr(trainer.Trainer, "train_step", step)
        with pytest.raises(KeyboardInterrupt):
            train(recipe("one-then-two"), progress=False)
    assert torchrun(tmp_path, recipe("one-then-two")).returncode == 0
    same(tmp_path / "one-then-two", tmp_path / "one")


def test_micro_batches_that_cannot_be_shared_are_refused(make_recipe):
    with pytest.raises(LayoutError, match=r"micro_batches is 4 .* 3 processes cannot share evenly"):
        layout_of(make_recipe(stages=STAGES).stages[0], 0, 3)

"""Stages of a run: one after another, judged on the way, and with a teacher that was written down."""

from __future__ import annotations

import math

import pytest

from gearshift.train import trainer
from gearshift.train.documents import DataError
from gearshift.train.run import train as run
from tests.train.tools import losses, rows

STAGES = [
    {"stage": "align", "steps": 2, "batch_size": 2, "sequence_length": 24},
    {"stage": "distill", "steps": 3, "batch_size": 1, "micro_batches": 2, "sequence_length": 32},
]


def test_stages_follow_one_another_and_can_be_resumed_at_any_step(make_recipe, tmp_path, monkeypatch):
    run(make_recipe(out=tmp_path / "whole", stages=STAGES), progress=False)
    assert [row["stage"] for row in rows(tmp_path / "whole")] == ["align"] * 2 + ["distill"] * 3
    assert [row["tokens"] for row in rows(tmp_path / "whole")] == [48, 96, 160, 224, 288]
    take_step = trainer.Trainer.train_step
    for last in (2, 3, 4):
        recipe = make_recipe(out=tmp_path / f"cut-{last}", stages=STAGES, save_every=1)

        def train_step(self, step, batches, last=last):
            if step == last + 1:
                raise KeyboardInterrupt
            return take_step(self, step, batches)

        with monkeypatch.context() as patch:
            patch.setattr(trainer.Trainer, "train_step", train_step)
            with pytest.raises(KeyboardInterrupt):
                run(recipe, progress=False)
        run(recipe, resume=True, progress=False)
        assert losses(recipe.out) == losses(tmp_path / "whole")


def test_held_out_quality_of_named_placements_is_logged(make_recipe, texts, supernet_directory):
    checks = {"data": [texts], "placements": ["fast", "fa*3"], "every": 3, "tokens": 96}
    run(make_recipe(held_out=checks, placements={"fast": "gdn*3"}), progress=False)
    judged = {row["step"]: row["held_out"] for row in rows(make_recipe().out) if "held_out" in row}
    assert list(judged) == [3, 6]
    for found in judged.values():
        assert found["fa*3"] == found["teacher"]
        assert found["teacher"]["retention"] == 1
        assert found["fast"]["quality"] == pytest.approx(math.exp(-found["fast"]["loss"]))
    assert judged[3]["fast"] != judged[6]["fast"]
    assert judged[3]["teacher"] == judged[6]["teacher"]


def test_a_student_learns_from_recorded_teacher_logits(make_recipe, tmp_path):
    """With all but one token written down it is the running teacher."""
    store = tmp_path / "logits"
    losses_ = {"forward_kl": 1.0, "activation": 0.0}
    assert run(make_recipe("record", top_k=256, write=store), progress=False) == store
    assert not (make_recipe().out / "supernet").exists()
    run(make_recipe(out=tmp_path / "online", losses=losses_), progress=False)
    run(make_recipe(out=tmp_path / "offline", losses=losses_, teacher_logits=store), progress=False)
    online, offline = (rows(tmp_path / name) for name in ("online", "offline"))
    assert [row["loss"] for row in offline] == pytest.approx([row["loss"] for row in online], rel=1e-3)
    with pytest.raises(DataError, match="was recorded for other tokens than those of step 1"):
        run(make_recipe(out=tmp_path / "other", losses=losses_, teacher_logits=store, seed=6), progress=False)
    with pytest.raises(DataError, match="nowhere holds no teacher_logits"):
        run(make_recipe(out=tmp_path / "x", losses=losses_, teacher_logits="nowhere"), progress=False)


def test_a_recording_that_is_trained_on_in_the_same_run(make_recipe, tmp_path):
    store = tmp_path / "logits"
    sizes = {"steps": 2, "batch_size": 2, "sequence_length": 24}
    losses_ = {"forward_kl": 1.0, "activation": 0.0}
    stages = [{"stage": "record", "write": store, **sizes}]
    stages += [{"stage": "distill", "losses": losses_, "teacher_logits": store, **sizes}]
    run(make_recipe(stages=stages), progress=False)
    assert [row["stage"] for row in rows(make_recipe().out)] == ["record"] * 2 + ["distill"] * 2
    assert rows(make_recipe().out)[-1]["loss"] > 0

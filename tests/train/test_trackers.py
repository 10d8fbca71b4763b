"""Trackers get every number of every row."""

from __future__ import annotations

import sys
from types import SimpleNamespace

import pytest

from gearshift.train.metrics import MetricsLog, TrackerError, numbers
from gearshift.train.trackers import check_trackers, open_trackers

ROW = {
    "step": 3,
    "stage": "distill",
    "loss": 0.5,
    "mfu": None,
    "mixers": {"gdn": {"activation": 0.25}},
    "layers": [0.5, None],
    "good": True,
}


def test_every_number_has_the_keys_that_lead_to_it():
    assert dict(numbers(ROW)) == {"step": 3, "loss": 0.5, "mixers/gdn/activation": 0.25, "layers/0": 0.5}


@pytest.mark.parametrize("name", ["trackio", "wandb"])
def test_a_tracker_gets_recipe_numbers_and_end(make_recipe, monkeypatch, tmp_path, name):
    seen = []
    library = SimpleNamespace(
        init=lambda **given: seen.append(("init", given["name"], given["config"]["seed"])),
        log=lambda given, step: seen.append(("log", step, given["loss"])),
        finish=lambda: seen.append(("finish",)),
    )
    monkeypatch.setitem(sys.modules, name, library)
    recipe = make_recipe(trackers=[name])
    with MetricsLog(tmp_path / "metrics.jsonl", 0, open_trackers(recipe, tmp_path)) as log:
        log.append(ROW)
    assert seen == [("init", "run", 5), ("log", 3, 0.5), ("finish",)]


def test_tensorboard_writes_event_files(make_recipe, tmp_path):
    pytest.importorskip("tensorboard")
    recipe = make_recipe(trackers=["tensorboard"])
    with MetricsLog(tmp_path / "metrics.jsonl", 0, open_trackers(recipe, tmp_path)) as log:
        log.append(ROW)
    assert list((tmp_path / "tensorboard").iterdir())


def test_a_tracker_that_is_not_installed_is_named_at_once(make_recipe, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(
        TrackerError, match=r"'wandb', which cannot be imported .*; pip install wandb, or leave"
    ):
        check_trackers(make_recipe(trackers=["wandb"]))

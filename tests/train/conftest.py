from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from gearshift.supernet import SupernetForCausalLM, load_supernet
from gearshift.train.distributed import Group
from gearshift.train.recipe import Recipe
from gearshift.train.setup import make_trainer as set_up
from gearshift.train.trainer import Trainer

ALONE = Group(0, 1, torch.device("cpu"))


@pytest.fixture
def tiny_model(supernet_directory) -> SupernetForCausalLM:
    return load_supernet(supernet_directory)


@pytest.fixture(scope="session")
def texts(tmp_path_factory) -> Path:
    """A file of documents."""
    path = tmp_path_factory.mktemp("texts") / "texts.jsonl"
    lines = [json.dumps({"text": f"def f{n}(x):\n    return x * {n} + {n * n}\n" * 5}) for n in range(40)]
    path.write_text("\n".join(lines) + "\n")
    return path


@pytest.fixture
def make_recipe(supernet_directory, texts, tmp_path) -> Callable[..., Recipe]:
    """A recipe of one stage of six tiny steps; every value of the recipe and of the stage can be changed."""

    def make(stage: str = "distill", **changes: Any) -> Recipe:
        values = {"supernet": supernet_directory, "out": tmp_path / "run", "data": [texts]}
        values |= {"save_every": 2, "device": "cpu", "seed": 5}
        steps = {"stage": stage, "steps": 6, "batch_size": 2, "sequence_length": 24}
        if stage != "record":
            steps["learning_rate"] = 3e-3
        for key, value in changes.items():
            (values if key in Recipe.model_fields else steps)[key] = value
        values.setdefault("stages", [steps])
        return Recipe.model_validate(values)

    return make


@pytest.fixture
def make_trainer(make_recipe) -> Callable[..., Trainer]:
    """The trainer of such a recipe, alone."""
    return lambda *args, **changes: set_up(make_recipe(*args, **changes), ALONE)

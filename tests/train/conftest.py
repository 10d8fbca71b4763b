from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from gearshift.supernet import SupernetForCausalLM, load_supernet
from gearshift.train.recipe import DistillRecipe


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
def make_recipe(supernet_directory, texts, tmp_path) -> Callable[..., DistillRecipe]:
    """A recipe of six tiny steps; every value can be changed."""

    def make(**changes: Any) -> DistillRecipe:
        values = {
            "supernet": supernet_directory,
            "out": tmp_path / "run",
            "data": [texts],
            "steps": 6,
            "batch_size": 2,
        }
        values |= {"sequence_length": 24, "learning_rate": 3e-3, "save_every": 2, "device": "cpu", "seed": 5}
        return DistillRecipe.model_validate(values | changes)

    return make

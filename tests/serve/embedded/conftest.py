"""A tiny supernet whose placements all say something else, and a server for it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedTokenizerBase

from gearshift.placement import Placement
from gearshift.presets import Preset
from gearshift.serve.catalog import Catalog
from gearshift.serve.embedded import EngineSettings
from gearshift.supernet import SupernetForCausalLM, load_supernet
from gearshift.train.tokens import load_tokenizer
from tests.serve.embedded.tools import ADMIN_KEY, NAME, PRESETS, Serving
from tests.supernet.tools import randomize

Serve = Callable[..., Serving]


@pytest.fixture(scope="package")
def model(supernet_directory: Path) -> SupernetForCausalLM:
    model = load_supernet(supernet_directory)
    torch.manual_seed(1)
    randomize(model)
    return model


@pytest.fixture(scope="package")
def tokenizer(supernet_directory: Path) -> PreTrainedTokenizerBase:
    return load_tokenizer(supernet_directory)


def make_catalog(model: SupernetForCausalLM) -> Catalog:
    presets = [Preset(name, Placement.parse(text)) for name, text in PRESETS.items()]
    return Catalog(NAME, model.placement_space, presets)


@pytest.fixture
def catalog(model: SupernetForCausalLM) -> Catalog:
    return make_catalog(model)


@pytest.fixture(scope="module")
def serving(model: SupernetForCausalLM, tokenizer: PreTrainedTokenizerBase) -> Iterator[Serving]:
    """One server for a file of tests; it must hold nothing when they are done."""
    serving = Serving(model, tokenizer, make_catalog(model))
    yield serving
    serving.wait_until_idle()
    serving.close()


@pytest.fixture
def serve(
    model: SupernetForCausalLM, tokenizer: PreTrainedTokenizerBase, catalog: Catalog
) -> Iterator[Serve]:
    """Start a server of one's own: another model, other settings."""
    with ExitStack() as running:

        def start(admin_key: str | None = ADMIN_KEY, **settings: int) -> Serving:
            serving = Serving(model, tokenizer, catalog, EngineSettings(**settings), admin_key)
            running.callback(serving.close)
            return serving

        yield start

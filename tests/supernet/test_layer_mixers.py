"""A supernet whose layers hold different mixers is the part of the whole one that it holds."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from gearshift.placement import PlacementError
from gearshift.supernet import (
    CheckpointError,
    SupernetConfig,
    SupernetForCausalLM,
    load_supernet,
    save_supernet,
)
from gearshift.supernet.checkpoint import expected_shapes
from tests.supernet.tools import assert_close, generate, only_holding, random_tokens

HELD = (
    ("full_attention", "kimi_delta_attention"),
    ("gated_delta_net",),
    ("sliding_attention", "full_attention"),
    ("kimi_delta_attention", "gated_delta_net"),
)
PLACEMENTS = ("fa gdn fa gdn", "kda gdn swa kda", "fa gdn swa kda")


@pytest.fixture(scope="module")
def thin(model: SupernetForCausalLM) -> SupernetForCausalLM:
    return only_holding(model, HELD)


@pytest.mark.parametrize("placement", PLACEMENTS)
@torch.no_grad()
def test_it_computes_what_the_whole_one_computes(
    model: SupernetForCausalLM, thin: SupernetForCausalLM, placement: str
) -> None:
    tokens = random_tokens(1, 2, 15)
    assert torch.equal(thin(tokens, placement=placement).logits, model(tokens, placement=placement).logits)
    prompt, options = random_tokens(2, 1, 5), {"placement": placement, "max_new_tokens": 8}
    assert torch.equal(generate(thin, prompt, **options), generate(model, prompt, **options))


def test_it_holds_no_other_weights(thin: SupernetForCausalLM) -> None:
    for layer, held in zip(thin.model.layers, HELD, strict=True):
        assert set(layer.mixers) == set(held)  # pyright: ignore[reportArgumentType]
    assert isinstance(thin.config, SupernetConfig)
    assert expected_shapes(thin.config) == {name: tuple(p.shape) for name, p in thin.named_parameters()}


def test_its_default_placement_has_full_attention_where_it_can(thin: SupernetForCausalLM) -> None:
    assert str(thin.placement) == "fa gdn fa gdn"


def test_other_placements_are_refused(thin: SupernetForCausalLM) -> None:
    with pytest.raises(PlacementError, match="has fa in layer 1; this layer holds only gdn"):
        thin(random_tokens(3, 1, 4), placement="fa*4")
    with pytest.raises(PlacementError, match="this layer holds only gdn"):
        thin.set_placement("kda*4")
    assert str(thin.placement) == "fa gdn fa gdn"


@torch.no_grad()
def test_saved_and_loaded(thin: SupernetForCausalLM, tmp_path: Path) -> None:
    loaded = load_supernet(save_supernet(thin, tmp_path / "thin"))
    assert loaded.placement_space == thin.placement_space
    tokens = random_tokens(4, 1, 9)
    assert_close(loaded(tokens, placement=PLACEMENTS[1]).logits, thin(tokens, placement=PLACEMENTS[1]).logits)


def test_weights_of_a_mixer_that_a_layer_lacks_are_surplus(
    model: SupernetForCausalLM, thin: SupernetForCausalLM, tmp_path: Path
) -> None:
    whole = save_supernet(model, tmp_path / "whole")
    thin.config.save_pretrained(whole)
    with pytest.raises(CheckpointError, match="has surplus .* tensors"):
        load_supernet(whole)

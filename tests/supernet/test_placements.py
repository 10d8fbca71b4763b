"""Which mixers a call runs, what it says of them, and what it refuses."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch.nn import functional
from transformers import AutoModelForCausalLM, DynamicCache

import gearshift
from gearshift.placement import Placement, PlacementError
from gearshift.supernet import BatchError, CacheError, SupernetForCausalLM
from tests.supernet.tools import (
    LAYERS,
    PLACEMENTS,
    VOCABULARY,
    assert_close,
    poisoned,
    random_tokens,
    tiny_config,
    tiny_supernet,
)


@pytest.mark.parametrize("placement", PLACEMENTS)
def test_other_mixers_are_not_touched(placement: str) -> None:
    model = tiny_supernet(seed=1)
    tokens = random_tokens(30, 2, 12)
    expected = model(tokens, placement=placement).logits
    with poisoned(model, Placement.parse(placement).mixers) as unused:
        out = model(tokens, placement=placement, labels=tokens, use_cache=True)
        assert out.loss is not None
        assert torch.equal(out.logits, expected)
        out.loss.backward()
        names = {id(p): n for n, p in model.named_parameters()}
        without = {names[id(p)] for p in model.parameters() if p.grad is None}
        assert without == {names[id(p)] for p in unused}
        assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)


@torch.no_grad()
def test_placements_differ(model: SupernetForCausalLM) -> None:
    tokens = random_tokens(31, 1, 20)
    logits = [model(tokens, placement=placement).logits for placement in PLACEMENTS]
    for i, first in enumerate(logits):
        for second in logits[:i]:
            assert (first - second).abs().max() > 0.01


@torch.no_grad()
def test_set_placement_holds_until_a_call_names_one() -> None:
    model = tiny_supernet(seed=2)
    tokens = random_tokens(32, 1, 9)
    assert model.placement == Placement.parse("fa*4")
    named = model(tokens, placement="kda gdn swa fa").logits
    model.set_placement(Placement.parse("kda gdn swa fa"))
    assert str(model.placement) == "kda gdn swa fa"
    assert torch.equal(model(tokens).logits, named)
    assert not torch.equal(model(tokens, placement="fa*4").logits, named)
    assert torch.equal(model(tokens).logits, named)
    assert model.new_cache().placement == model.placement


def test_the_configs_placement_is_the_first() -> None:
    model = tiny_supernet(3, tiny_config(placement="gdn*3 fa"))
    assert str(model.placement) == "gdn*3 fa"
    assert model.placement_space.num_layers == LAYERS


@pytest.mark.parametrize(
    ("placement", "message"), [("fa*3", "3"), ("fa*3 mamba", "unknown mixer 'mamba'"), ("fa*5", "5")]
)
def test_a_wrong_placement_is_refused(model: SupernetForCausalLM, placement: str, message: str) -> None:
    for use in (model.set_placement, model.new_cache, lambda p: model(random_tokens(33, 1, 3), placement=p)):
        with pytest.raises(PlacementError, match=message):
            use(placement)


def test_a_mixer_the_supernet_does_not_hold_is_refused() -> None:
    model = tiny_supernet(4, tiny_config(["full_attention", "gated_delta_net"]))
    with pytest.raises(PlacementError, match="kimi_delta_attention|kda"):
        model.set_placement("kda*4")


@pytest.mark.parametrize("placement", PLACEMENTS)
@torch.no_grad()
def test_mixer_outputs_are_what_each_layer_adds(model: SupernetForCausalLM, placement: str) -> None:
    """The layers' residual sums, rebuilt from the outputs and the shared modules, end in the logits."""
    tokens = random_tokens(34, 2, 8)
    out = model(tokens, placement=placement, output_mixer_outputs=True)
    assert out.mixer_outputs is not None and len(out.mixer_outputs) == LAYERS
    hidden = model.model.embed_tokens(tokens)
    for layer, mixed in zip(model.model.layers, out.mixer_outputs, strict=True):
        assert mixed.shape == (2, 8, model.config.hidden_size)
        hidden = hidden + mixed
        hidden = hidden + layer.get_submodule("mlp")(layer.get_submodule("post_attention_layernorm")(hidden))
    assert_close(model.lm_head(model.model.norm(hidden)), out.logits, 1e-5)
    assert model(tokens, placement=placement).mixer_outputs is None


@torch.no_grad()
def test_loss_is_the_cross_entropy_of_the_next_token(model: SupernetForCausalLM) -> None:
    tokens = random_tokens(35, 2, 9)
    labels = tokens.clone()
    labels[0, :4] = -100
    out = model(tokens, labels=labels, placement="swa gdn kda fa")
    losses = functional.cross_entropy(
        out.logits[:, :-1].reshape(-1, VOCABULARY), tokens[:, 1:].reshape(-1), reduction="none"
    )
    counted = (labels[:, 1:] != -100).reshape(-1)
    assert out.loss is not None
    assert float(out.loss) == pytest.approx(float(losses[counted].mean()), abs=1e-5)


def test_a_cache_serves_one_placement(model: SupernetForCausalLM) -> None:
    cache = model.new_cache("fa swa gdn kda")
    expected = r"belongs to the placement 'fa swa gdn kda', the call uses 'fa\*4'"
    with pytest.raises(CacheError, match=expected):
        model(random_tokens(36, 1, 3), past_key_values=cache, placement="fa*4")
    assert "fa swa gdn kda" in repr(cache) and "length=0" in repr(cache)
    assert not cache.is_compileable


def test_a_foreign_cache_is_refused(model: SupernetForCausalLM) -> None:
    with pytest.raises(CacheError, match=r"is a DynamicCache; expected one made by model.new_cache"):
        model(random_tokens(37, 1, 3), past_key_values=DynamicCache())


def test_tokens_or_embeddings_and_not_both(model: SupernetForCausalLM) -> None:
    tokens = random_tokens(38, 1, 3)
    embeddings = model.model.embed_tokens(tokens)
    for inputs in ({"input_ids": tokens, "inputs_embeds": embeddings}, {}):
        with pytest.raises(BatchError, match="exactly one of input_ids and inputs_embeds"):
            model(**inputs)


@pytest.mark.parametrize("shape", [(2, 5), (1, 6), (2, 7)])
@torch.no_grad()
def test_a_mask_of_another_shape_is_refused(model: SupernetForCausalLM, shape: tuple[int, int]) -> None:
    cache = model.new_cache()
    model(random_tokens(39, 2, 2), past_key_values=cache)
    with pytest.raises(BatchError) as caught:
        model(random_tokens(39, 2, 4), attention_mask=torch.ones(shape), past_key_values=cache)
    assert f"attention_mask has shape {shape}; expected (2, 6)" in str(caught.value)
    assert "2 cached and 4 new tokens" in str(caught.value)


@torch.no_grad()
def test_transformers_auto_class_loads_a_saved_model(tmp_path: Path, model: SupernetForCausalLM) -> None:
    assert gearshift.__version__
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert isinstance(loaded, SupernetForCausalLM)
    tokens = random_tokens(40, 1, 9)
    for placement in PLACEMENTS:
        assert torch.equal(
            loaded(tokens, placement=placement).logits, model(tokens, placement=placement).logits
        )

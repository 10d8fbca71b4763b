"""Transformers' generate with any placement."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from gearshift.supernet import CacheError, SupernetForCausalLM
from tests.supernet.tools import PLACEMENTS, VOCABULARY, generate, random_tokens, tiny_config, tiny_supernet

NEW = 9
GREEDY = {"max_new_tokens": NEW}


@torch.no_grad()
def argmax_step_by_step(model: SupernetForCausalLM, tokens: Tensor, placement: str) -> Tensor:
    for _ in range(NEW):
        best = model(tokens, placement=placement).logits[:, -1].argmax(-1)
        tokens = torch.cat([tokens, best[:, None]], dim=1)
    return tokens


@pytest.mark.parametrize("use_cache", [True, False])
@pytest.mark.parametrize("placement", PLACEMENTS)
def test_greedy_is_the_argmax_step_by_step(
    model: SupernetForCausalLM, placement: str, use_cache: bool
) -> None:
    tokens = random_tokens(50, 2, 8)
    given = generate(model, tokens, placement=placement, use_cache=use_cache, **GREEDY)
    assert torch.equal(given, argmax_step_by_step(model, tokens, placement))


def test_set_placement_is_used() -> None:
    model = tiny_supernet(seed=5)
    model.set_placement("kda swa gdn fa")
    tokens = random_tokens(51, 1, 8)
    assert torch.equal(
        generate(model, tokens, **GREEDY), argmax_step_by_step(model, tokens, "kda swa gdn fa")
    )


@pytest.mark.parametrize("placement", PLACEMENTS)
def test_a_left_padded_batch_is_its_solo_runs(model: SupernetForCausalLM, placement: str) -> None:
    lengths = (9, 2, 6)
    prompts = [random_tokens(52 + length, 1, length) for length in lengths]
    batch, mask = torch.zeros(3, 9, dtype=torch.long), torch.zeros(3, 9, dtype=torch.long)
    for row, prompt in enumerate(prompts):
        batch[row, 9 - prompt.shape[1] :] = prompt
        mask[row, 9 - prompt.shape[1] :] = 1
    given = generate(model, batch, attention_mask=mask, placement=placement, **GREEDY)
    for row, prompt in enumerate(prompts):
        alone = generate(model, prompt, placement=placement, **GREEDY)
        assert torch.equal(given[row, -NEW:], alone[0, -NEW:])


@pytest.mark.parametrize("placement", PLACEMENTS)
def test_beam_search_reorders_the_cache(model: SupernetForCausalLM, placement: str) -> None:
    tokens = random_tokens(53, 2, 8)
    beams = {"num_beams": 3, "placement": placement, **GREEDY}
    assert torch.equal(generate(model, tokens, **beams), generate(model, tokens, use_cache=False, **beams))


def test_beam_search_of_full_attention_is_llamas() -> None:
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=40,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        rms_norm_eps=1e-5,
        bos_token_id=None,
        eos_token_id=None,
    )
    model = tiny_supernet(6, tiny_config(["full_attention"]))
    llama = LlamaForCausalLM(config).eval()
    weights = {n.replace("mixers.full_attention", "self_attn"): p for n, p in model.state_dict().items()}
    llama.load_state_dict(weights)
    tokens = random_tokens(54, 2, 8)
    with torch.no_grad():
        assert (model(tokens).logits - llama(tokens).logits).abs().max() < 1e-4
    for beams in (1, 4):
        given = generate(model, tokens, num_beams=beams, **GREEDY)
        assert torch.equal(given, generate(llama, tokens, num_beams=beams, **GREEDY))


@torch.no_grad()
def test_a_cache_of_the_caller_is_continued(model: SupernetForCausalLM) -> None:
    placement = "kda gdn swa fa"
    tokens = random_tokens(55, 1, 8)
    cache = model.new_cache(placement)
    model(tokens[:, :5], past_key_values=cache, placement=placement)
    given = generate(model, tokens, past_key_values=cache, placement=placement, **GREEDY)
    assert torch.equal(given, argmax_step_by_step(model, tokens, placement))
    with pytest.raises(CacheError, match="belongs to the placement"):
        generate(model, tokens, past_key_values=model.new_cache("fa*4"), placement=placement, **GREEDY)

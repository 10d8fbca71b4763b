"""Decoding with a cache gives what one forward pass over all tokens gives, whatever the pieces."""

from __future__ import annotations

import pytest
import torch

from gearshift.supernet import SupernetForCausalLM
from gearshift.supernet.cache import KeyValueState
from tests.supernet.tools import PLACEMENTS, UNIFORM, WINDOW, assert_close, feed, random_tokens

LENGTH = 70  # beyond a chunk of the delta rules, many windows
PIECES = {
    "token by token": [1] * LENGTH,
    "prompt, then tokens": [LENGTH - 12] + [1] * 12,
    "uneven": [3, 1, WINDOW, 2, 40, WINDOW + 1, LENGTH - 58, 1],
}


@pytest.mark.parametrize("pieces", PIECES)
@pytest.mark.parametrize("placement", PLACEMENTS)
@torch.no_grad()
def test_equals_the_full_forward(model: SupernetForCausalLM, placement: str, pieces: str) -> None:
    tokens = random_tokens(1, 2, LENGTH)
    full = model(tokens, placement=placement).logits
    assert full.std() > 0.1  # logits of zero would agree always
    cache = model.new_cache(placement)
    assert_close(feed(model, cache, tokens, PIECES[pieces]), full)
    assert cache.get_seq_length() == LENGTH


@pytest.mark.parametrize("max_rollback", [1, 3])
@pytest.mark.parametrize("placement", UNIFORM)
@torch.no_grad()
def test_keeping_older_states_changes_nothing(
    model: SupernetForCausalLM, placement: str, max_rollback: int
) -> None:
    tokens = random_tokens(2, 2, LENGTH)
    cache = model.new_cache(placement, max_rollback)
    assert_close(feed(model, cache, tokens, PIECES["uneven"]), model(tokens, placement=placement).logits)


@pytest.mark.parametrize("placement", UNIFORM)
@torch.no_grad()
def test_use_cache_makes_one(model: SupernetForCausalLM, placement: str) -> None:
    tokens = random_tokens(3, 1, 20)
    first = model(tokens[:, :11], placement=placement, use_cache=True)
    second = model(tokens[:, 11:], placement=placement, past_key_values=first.past_key_values)
    both = torch.cat([first.logits, second.logits], dim=1)
    assert_close(both, model(tokens, placement=placement).logits)
    assert model(tokens, placement=placement).past_key_values is None


@torch.no_grad()
def test_embeddings_in_place_of_tokens(model: SupernetForCausalLM) -> None:
    tokens = random_tokens(4, 2, 9)
    embeddings = model.model.embed_tokens(tokens)
    assert torch.equal(model(inputs_embeds=embeddings).logits, model(tokens).logits)


@torch.no_grad()
def test_logits_to_keep(model: SupernetForCausalLM) -> None:
    tokens = random_tokens(5, 2, 9)
    full = model(tokens).logits
    assert_close(model(tokens, logits_to_keep=2).logits, full[:, -2:], 1e-5)
    places = torch.tensor([0, 4])
    assert_close(model(tokens, logits_to_keep=places).logits, full[:, places], 1e-5)


@torch.no_grad()
def test_a_window_holds_no_more_than_it_needs(model: SupernetForCausalLM) -> None:
    cache = model.new_cache("swa*4", max_rollback=2)
    feed(model, cache, random_tokens(6, 1, LENGTH), [LENGTH - 1, 1])
    for state in cache.states:
        assert isinstance(state, KeyValueState)
        keys, values = state.kept()
        assert keys.shape[2] == values.shape[2] == WINDOW - 1 + 2


@pytest.mark.parametrize("placement", PLACEMENTS)
@torch.no_grad()
def test_reordered_rows_take_their_states_along(model: SupernetForCausalLM, placement: str) -> None:
    """What beam search does: rows repeated, then taken in another order."""
    tokens = random_tokens(7, 2, 24)
    full = model(tokens, placement=placement).logits
    cache = model.new_cache(placement, max_rollback=1)
    feed(model, cache, tokens[:, :20], [19, 1])
    cache.batch_repeat_interleave(2)
    order = torch.tensor([3, 0, 2, 1])
    cache.reorder_cache(order)
    source = torch.tensor([0, 0, 1, 1])[order]
    rows = tokens[source]
    assert_close(feed(model, cache, rows[:, 20:22], [1, 1]), full[source, 20:22])
    cache.rollback(1)
    cache.batch_select_indices(torch.tensor([0, 1]))
    assert_close(feed(model, cache, rows[:2, 21:], [2, 1]), full[source[:2], 21:])

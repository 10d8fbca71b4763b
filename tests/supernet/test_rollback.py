"""Rollback and snapshots: afterwards the cache is as if it had never seen the tokens taken back."""

from __future__ import annotations

import random
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from gearshift.supernet import CacheError, CacheSnapshot, SupernetCache, SupernetForCausalLM
from tests.supernet.tools import MIXED, PLACEMENTS, VOCABULARY, WINDOW, assert_close, feed, random_tokens

MAX_ROLLBACK = 3


@pytest.fixture(autouse=True)
def no_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


@pytest.mark.parametrize("back", [1, 2, MAX_ROLLBACK])
@pytest.mark.parametrize("before", [MAX_ROLLBACK, WINDOW + 1, 2 * WINDOW + 3])
@pytest.mark.parametrize("placement", PLACEMENTS)
def test_other_tokens_after_a_rollback(
    model: SupernetForCausalLM, placement: str, before: int, back: int
) -> None:
    seen, other = random_tokens(before, 2, before), random_tokens(100 + back, 2, 2 * WINDOW)
    cache = model.new_cache(placement, MAX_ROLLBACK)
    feed(model, cache, seen, [before])
    cache.rollback(back)
    assert cache.get_seq_length() == before - back
    whole = torch.cat([seen[:, : before - back], other], dim=1)
    expected = model(whole, placement=placement).logits[:, before - back :]
    assert_close(feed(model, cache, other, [2, 1, 2 * WINDOW - 3]), expected)


@pytest.mark.parametrize("placement", PLACEMENTS)
def test_a_second_rollback_is_right_or_refused(model: SupernetForCausalLM, placement: str) -> None:
    """The first one used up the older states, and a window's older keys."""
    tokens = random_tokens(1, 1, 3 * WINDOW)
    cache = model.new_cache(placement, MAX_ROLLBACK)
    feed(model, cache, tokens, [3 * WINDOW])
    cache.rollback(MAX_ROLLBACK)
    kept = tokens[:, : 3 * WINDOW - MAX_ROLLBACK]
    extra = random_tokens(2, 1, 1)
    feed(model, cache, extra, [1])
    before = cache.get_seq_length()
    try:
        cache.rollback(MAX_ROLLBACK)
    except CacheError as error:
        assert f"cannot roll back {MAX_ROLLBACK} tokens" in str(error)
        assert placement != "fa*4"
        assert cache.get_seq_length() == before
        kept = torch.cat([kept, extra], dim=1)
    else:
        kept = kept[:, : 1 - MAX_ROLLBACK]
    after = random_tokens(3, 1, 4)
    expected = model(torch.cat([kept, after], dim=1), placement=placement).logits[:, kept.shape[1] :]
    assert_close(feed(model, cache, after, [1, 3]), expected)


@pytest.mark.parametrize("placement", PLACEMENTS)
def test_restoring_twice(model: SupernetForCausalLM, placement: str) -> None:
    """Three continuations from one snapshot, the last of them far beyond the buffers' first size."""
    prompt = random_tokens(4, 2, 2 * WINDOW)
    cache = model.new_cache(placement)
    feed(model, cache, prompt, [7, 2 * WINDOW - 7])
    snapshot = cache.snapshot()
    for seed, length in ((5, 1), (6, WINDOW + 2), (7, 100)):
        branch = random_tokens(seed, 2, length)
        expected = model(torch.cat([prompt, branch], dim=1), placement=placement).logits[:, 2 * WINDOW :]
        pieces = [1] if length == 1 else [1, length - 1]
        assert_close(feed(model, cache, branch, pieces), expected)
        cache.restore(snapshot)
        assert cache.get_seq_length() == 2 * WINDOW


def test_a_snapshot_of_an_empty_cache(model: SupernetForCausalLM) -> None:
    for placement in MIXED:
        cache = model.new_cache(placement)
        empty = cache.snapshot()
        feed(model, cache, random_tokens(8, 1, 9), [9])
        cache.restore(empty)
        tokens = random_tokens(9, 2, 9)  # even the number of rows may change
        assert_close(feed(model, cache, tokens, [4, 5]), model(tokens, placement=placement).logits)


def test_rollback_beyond_what_is_kept_is_refused(model: SupernetForCausalLM) -> None:
    cache = model.new_cache("fa swa gdn kda", MAX_ROLLBACK)
    feed(model, cache, random_tokens(10, 1, 2), [2])
    for tokens, limit in ((3, 2), (-1, 2)):
        with pytest.raises(CacheError, match=f"cannot roll back {tokens} tokens; expected 0 to {limit}"):
            cache.rollback(tokens)
    feed(model, cache, random_tokens(10, 1, 9), [9])
    with pytest.raises(CacheError, match=r"expected 0 to 3 \(max_rollback=3, 11 tokens cached\)"):
        cache.rollback(4)
    with pytest.raises(CacheError, match="max_rollback=0"):
        model.new_cache().rollback(1)


def test_a_refused_rollback_changes_nothing(model: SupernetForCausalLM) -> None:
    """A recurrent layer refuses after the attention layers before it had rolled back."""
    placement = "fa swa gdn kda"
    tokens = random_tokens(11, 2, 12)
    mask = torch.ones(2, 8, dtype=torch.long)
    mask[0, 0] = 0
    cache = model.new_cache(placement, MAX_ROLLBACK)
    model(tokens[:, :8], attention_mask=mask, past_key_values=cache, placement=placement)
    with pytest.raises(
        CacheError, match="cannot roll back 2 tokens; this layer kept the states of the last 0"
    ):
        cache.rollback(2)
    mask = torch.cat([mask, torch.ones(2, 4, dtype=torch.long)], dim=1)
    after = model(tokens[:, 8:], attention_mask=mask, past_key_values=cache, placement=placement).logits
    expected = model(tokens, attention_mask=mask, placement=placement).logits
    assert_close(after, expected[:, 8:])


def test_a_snapshot_that_was_cut_is_refused(model: SupernetForCausalLM) -> None:
    cache = model.new_cache("fa swa gdn kda", MAX_ROLLBACK)
    feed(model, cache, random_tokens(12, 1, 6), [6])
    early = cache.snapshot()
    feed(model, cache, random_tokens(12, 1, 2), [2])
    late = cache.snapshot()
    cache.rollback(1)
    feed(model, cache, random_tokens(13, 1, 3), [3])
    with pytest.raises(CacheError, match="this snapshot of 8 tokens is no longer valid"):
        cache.restore(late)
    cache.restore(early)
    assert cache.get_seq_length() == 6


def test_crop_is_transformers_name_for_rollback(model: SupernetForCausalLM) -> None:
    cache = model.new_cache("fa swa gdn kda", MAX_ROLLBACK)
    feed(model, cache, random_tokens(14, 1, 6), [6])
    cache.crop(-2)
    assert cache.get_seq_length() == 4


class Script:
    """Random feeds, rollbacks, snapshots and restores; after each feed the logits are recomputed."""

    def __init__(self, model: SupernetForCausalLM, placement: str, seed: int) -> None:
        self.model, self.placement = model, placement
        self.random = random.Random(seed)
        self.cache: SupernetCache = model.new_cache(placement, MAX_ROLLBACK)
        self.tokens: list[int] = []
        self.snapshots: list[tuple[CacheSnapshot, list[int]]] = []
        self.refused = 0

    def feed(self) -> None:
        count = self.random.choice([1, 1, 2, 4, WINDOW + 2])
        new = [self.random.randrange(VOCABULARY) for _ in range(count)]
        logits = feed(self.model, self.cache, torch.tensor([new]), [len(new)])
        self.tokens += new
        expected: Tensor = self.model(torch.tensor([self.tokens]), placement=self.placement).logits
        assert_close(logits, expected[:, -len(new) :])

    def rollback(self) -> None:
        count = self.random.randint(1, MAX_ROLLBACK)
        try:
            self.cache.rollback(count)
        except CacheError:
            self.refused += 1
        else:
            del self.tokens[-count:]

    def snapshot(self) -> None:
        self.snapshots.append((self.cache.snapshot(), list(self.tokens)))

    def restore(self) -> None:
        if not self.snapshots:
            return
        snapshot, tokens = self.random.choice(self.snapshots)
        still_there = self.tokens[: len(tokens)] == tokens
        try:
            self.cache.restore(snapshot)
        except CacheError:
            self.refused += 1
        else:
            # Only a prefix of what was fed since can be gone back to.
            assert still_there
            self.tokens = list(tokens)

    def run(self, steps: int) -> None:
        actions = [self.feed, self.feed, self.feed, self.rollback, self.snapshot, self.restore]
        for _ in range(steps):
            self.random.choice(actions)()
            assert self.cache.get_seq_length() == len(self.tokens)
        self.feed()


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("placement", PLACEMENTS)
def test_random_scripts(model: SupernetForCausalLM, placement: str, seed: int) -> None:
    script = Script(model, placement, seed)
    script.run(30)
    assert len(script.tokens) > 0
    assert script.refused < 20

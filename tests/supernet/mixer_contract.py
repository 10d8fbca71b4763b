"""The suite that every mixer must pass. Subclass it with a name and sizes; see test_mixer_contract.py."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch

from gearshift.placement import FULL_ATTENTION, Placement
from gearshift.supernet import SupernetForCausalLM
from tests.supernet.tools import (
    LAYERS,
    MIXER_SIZES,
    VOCABULARY,
    assert_close,
    feed,
    padded_batch,
    poisoned,
    random_tokens,
    tiny_config,
    tiny_supernet,
)

LENGTHS = (23, 4, 11)
SIDES = {"left": [4, 23, 16], "right": [0, 0, 0], "both": [2, 9, 5]}
WIDTH = 27


class MixerContract:
    """What a placement may expect of a mixer.

    Attributes:
        mixer: the mixer's long name, registered.
        sizes: its entry in a config whose ``hidden_size`` is 32.
        max_rollback: a rollback that its state must allow.
    """

    mixer: ClassVar[str]
    sizes: ClassVar[dict[str, Any]]
    max_rollback: ClassVar[int] = 3

    @pytest.fixture(scope="class")
    @classmethod
    def supernet(cls) -> SupernetForCausalLM:
        """A random supernet with the mixer and full attention."""
        names = list(dict.fromkeys([FULL_ATTENTION, cls.mixer]))
        sizes = {**MIXER_SIZES, cls.mixer: cls.sizes}
        model = tiny_supernet(7, tiny_config(names, sizes))
        model.set_placement(Placement.uniform(cls.mixer, LAYERS))
        return model

    @torch.no_grad()
    def test_no_token_sees_the_future(self, supernet: SupernetForCausalLM) -> None:
        tokens = random_tokens(60, 1, 20)
        other = torch.cat([tokens[:, :9], random_tokens(61, 1, 11)], dim=1)
        assert_close(supernet(other).logits[:, :9], supernet(tokens).logits[:, :9])
        assert (supernet(other).logits[:, 9:] - supernet(tokens).logits[:, 9:]).abs().max() > 0.01

    @torch.no_grad()
    def test_a_token_sees_the_past(self, supernet: SupernetForCausalLM) -> None:
        tokens = random_tokens(62, 1, 4)
        other = tokens.clone()
        other[0, 1] = (other[0, 1] + 1) % VOCABULARY
        difference = supernet(other).logits[:, 2:] - supernet(tokens).logits[:, 2:]
        assert difference.abs().max() > 1e-3

    @pytest.mark.parametrize(
        "pieces", [[1] * 41, [40, 1], [1, 7, 20, 2, 11]], ids=["tokens", "prompt", "uneven"]
    )
    @pytest.mark.parametrize("max_rollback", [0, 2])
    @torch.no_grad()
    def test_cached_is_full(
        self, supernet: SupernetForCausalLM, pieces: list[int], max_rollback: int
    ) -> None:
        tokens = random_tokens(63, 2, 41)
        cache = supernet.new_cache(max_rollback=max_rollback)
        assert_close(feed(supernet, cache, tokens, pieces), supernet(tokens).logits)

    @torch.no_grad()
    def test_rollback(self, supernet: SupernetForCausalLM) -> None:
        for back in range(self.max_rollback + 1):
            seen, other = random_tokens(64 + back, 2, 15), random_tokens(70 + back, 2, 9)
            cache = supernet.new_cache(max_rollback=self.max_rollback)
            feed(supernet, cache, seen, [12, 3])
            cache.rollback(back)
            expected = supernet(torch.cat([seen[:, : 15 - back], other], dim=1)).logits[:, 15 - back :]
            assert_close(feed(supernet, cache, other, [1, 8]), expected)

    @torch.no_grad()
    def test_snapshot(self, supernet: SupernetForCausalLM) -> None:
        seen = random_tokens(80, 2, 15)
        cache = supernet.new_cache()
        feed(supernet, cache, seen, [15])
        snapshot = cache.snapshot()
        for seed in (81, 82):
            other = random_tokens(seed, 2, 9)
            expected = supernet(torch.cat([seen, other], dim=1)).logits[:, 15:]
            assert_close(feed(supernet, cache, other, [1, 8]), expected)
            cache.restore(snapshot)

    @torch.no_grad()
    def test_reordered_rows(self, supernet: SupernetForCausalLM) -> None:
        tokens = random_tokens(83, 3, 16)
        cache = supernet.new_cache()
        feed(supernet, cache, tokens[:, :9], [9])
        order = torch.tensor([2, 2, 0])
        cache.reorder_cache(order)
        assert_close(feed(supernet, cache, tokens[order, 9:], [7]), supernet(tokens[order]).logits[:, 9:])

    @pytest.mark.parametrize("side", SIDES)
    @torch.no_grad()
    def test_padded_is_solo(self, supernet: SupernetForCausalLM, side: str) -> None:
        sequences, batch, mask = padded_batch(89, LENGTHS, SIDES[side], WIDTH)
        logits = supernet(batch, attention_mask=mask).logits
        for row, sequence in enumerate(sequences):
            assert_close(logits[row][mask[row].bool()], supernet(sequence[None]).logits[0])

    @pytest.mark.parametrize("side", SIDES)
    @torch.no_grad()
    def test_padded_and_cached_is_solo(self, supernet: SupernetForCausalLM, side: str) -> None:
        sequences, batch, mask = padded_batch(89, LENGTHS, SIDES[side], WIDTH)
        more = random_tokens(84, len(LENGTHS), 8)
        tokens, mask = torch.cat([batch, more], dim=1), torch.cat([mask, torch.ones_like(more)], dim=1)
        cache = supernet.new_cache()
        logits, start = [], 0
        for end in (10, WIDTH, WIDTH + 1, WIDTH + 8):
            inputs = {"attention_mask": mask[:, :end], "past_key_values": cache}
            logits.append(supernet(tokens[:, start:end], **inputs).logits)
            start = end
        together = torch.cat(logits, dim=1)
        for row, sequence in enumerate(sequences):
            alone = supernet(torch.cat([sequence, more[row]])[None]).logits[0]
            assert_close(together[row][mask[row].bool()], alone)

    @torch.no_grad()
    def test_packed_is_solo(self, supernet: SupernetForCausalLM) -> None:
        documents = [random_tokens(85 + length, 1, length) for length in LENGTHS]
        ends = torch.tensor([0, *LENGTHS]).cumsum(0)
        logits = supernet(torch.cat(documents, dim=1), cu_seqlens=ends).logits
        for document, given in zip(documents, logits.split(LENGTHS, dim=1), strict=True):
            assert_close(given, supernet(document).logits)

    def test_every_weight_learns(self, supernet: SupernetForCausalLM) -> None:
        supernet.zero_grad(set_to_none=True)
        tokens = random_tokens(86, 2, 20)
        loss = supernet(tokens, labels=tokens).loss
        assert loss is not None
        loss.backward()
        for layer in supernet.model.layers:
            for name, parameter in layer.get_submodule(f"mixers.{self.mixer}").named_parameters():
                assert parameter.grad is not None, name
                assert parameter.grad.isfinite().all(), name
                assert parameter.grad.abs().max() > 0, name
        supernet.zero_grad(set_to_none=True)

    @torch.no_grad()
    def test_not_touched_when_unused(self, supernet: SupernetForCausalLM) -> None:
        tokens = random_tokens(87, 2, 12)
        mixers = (FULL_ATTENTION, self.mixer, FULL_ATTENTION, self.mixer)
        expected = supernet(tokens, placement=list(mixers)).logits
        with poisoned(supernet, mixers):
            assert torch.equal(supernet(tokens, placement=list(mixers)).logits, expected)

    @torch.no_grad()
    def test_saved_and_loaded(self, supernet: SupernetForCausalLM, tmp_path: Path) -> None:
        supernet.save_pretrained(tmp_path)
        loaded = SupernetForCausalLM.from_pretrained(tmp_path)
        tokens = random_tokens(88, 1, 12)
        assert torch.equal(loaded(tokens, placement=supernet.placement).logits, supernet(tokens).logits)

"""In a packed batch each document gets what it gets alone."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from gearshift.supernet import BatchError, SupernetForCausalLM
from tests.supernet.tools import PLACEMENTS, WINDOW, assert_close, random_tokens, relative_error

LENGTHS = (4, WINDOW + 9, 1, 68)
ENDS = [0, *torch.tensor(LENGTHS).cumsum(0).tolist()]


def packed(seed: int) -> tuple[list[Tensor], Tensor]:
    documents = [random_tokens(seed + length, 1, length) for length in LENGTHS]
    return documents, torch.cat(documents, dim=1)


def restarting_positions() -> Tensor:
    return torch.cat([torch.arange(length) for length in LENGTHS])[None]


BORDERS = {
    "cu_seqlens": {"cu_seqlens": torch.tensor(ENDS, dtype=torch.int32)},
    "position_ids": {"position_ids": restarting_positions()},
    "both": {"cu_seqlens": torch.tensor(ENDS), "position_ids": restarting_positions()},
}


@pytest.mark.parametrize("borders", BORDERS)
@pytest.mark.parametrize("placement", PLACEMENTS)
@torch.no_grad()
def test_each_document_equals_its_solo_run(model: SupernetForCausalLM, placement: str, borders: str) -> None:
    documents, batch = packed(seed=20)
    logits = model(batch, placement=placement, **BORDERS[borders]).logits
    for document, given in zip(documents, logits.split(LENGTHS, dim=1), strict=True):
        assert_close(given, model(document, placement=placement).logits)


@pytest.mark.parametrize("placement", PLACEMENTS)
def test_gradients_are_those_of_the_solo_runs(model: SupernetForCausalLM, placement: str) -> None:
    documents, batch = packed(seed=21)
    weights = torch.randn(1, batch.shape[1], model.config.vocab_size)
    logits = model(batch, placement=placement, **BORDERS["cu_seqlens"]).logits
    alone = torch.cat([model(document, placement=placement).logits for document in documents], dim=1)
    together, apart = (
        torch.autograd.grad((x * weights).sum(), list(model.parameters()), allow_unused=True)
        for x in (logits, alone)
    )
    assert [g is None for g in together] == [g is None for g in apart]
    pairs = [(g, e) for g, e in zip(together, apart, strict=True) if g is not None and e is not None]
    assert max(relative_error(given, expected) for given, expected in pairs) < 1e-4


@torch.no_grad()
def test_one_document_is_a_plain_batch(model: SupernetForCausalLM) -> None:
    tokens = random_tokens(22, 1, 9)
    given = model(tokens, cu_seqlens=torch.tensor([0, 9])).logits
    assert torch.equal(given, model(tokens).logits)


@pytest.mark.parametrize("ends", [[0, 3], [1, 9], [0, 5, 5, 9], [0, 6, 4, 9], [0], [0, 12]], ids=str)
def test_wrong_borders_are_refused(model: SupernetForCausalLM, ends: list[int]) -> None:
    with pytest.raises(BatchError) as caught:
        model(random_tokens(23, 1, 9), cu_seqlens=torch.tensor(ends))
    assert f"cu_seqlens is {ends} for a batch of shape (1, 9)" in str(caught.value)
    assert "rising borders from 0 to 9" in str(caught.value)


def test_two_rows_cannot_be_packed(model: SupernetForCausalLM) -> None:
    with pytest.raises(BatchError, match="expected one row"):
        model(random_tokens(24, 2, 9), cu_seqlens=torch.tensor([0, 4, 9]))


def test_a_mask_and_borders_are_refused(model: SupernetForCausalLM) -> None:
    with pytest.raises(BatchError, match=r"attention_mask .* or cu_seqlens .* not both"):
        model(random_tokens(25, 1, 9), attention_mask=torch.ones(1, 9), cu_seqlens=torch.tensor([0, 4, 9]))


@pytest.mark.parametrize("borders", [{"cu_seqlens": torch.tensor([0, 4, 9])}, {"use_cache": True}], ids=str)
def test_a_packed_batch_cannot_be_cached(model: SupernetForCausalLM, borders: dict) -> None:
    positions = torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3, 4]])
    with pytest.raises(
        BatchError, match="a packed batch cannot be cached; run its documents as a padded batch"
    ):
        inputs = {"position_ids": positions, "past_key_values": model.new_cache(), **borders}
        model(random_tokens(26, 1, 9), **inputs)

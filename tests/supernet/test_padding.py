"""In a padded batch, whatever the side and the padding's tokens, each sequence gets what it gets alone."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from gearshift.supernet import SupernetForCausalLM
from tests.supernet.tools import (
    LAYERS,
    PLACEMENTS,
    WINDOW,
    assert_close,
    padded_batch,
    random_tokens,
    relative_error,
)

LENGTHS = (WINDOW + 12, 3, 9)
WIDTH = max(LENGTHS) + 4
# How many padding tokens lie before each sequence; the rest of its row lies behind.
BEFORE = {
    "left": [WIDTH - length for length in LENGTHS],
    "right": [0, 0, 0],
    "both": [2, 5, 8],
    "mixed": [WIDTH - LENGTHS[0], 0, 6],
}


@pytest.mark.parametrize("side", BEFORE)
@pytest.mark.parametrize("placement", PLACEMENTS)
@torch.no_grad()
def test_each_sequence_equals_its_solo_run(model: SupernetForCausalLM, placement: str, side: str) -> None:
    sequences, batch, mask = padded_batch(10, LENGTHS, BEFORE[side], WIDTH)
    logits = model(batch, attention_mask=mask, placement=placement).logits
    assert logits.isfinite().all()
    for row, sequence in enumerate(sequences):
        assert_close(logits[row][mask[row].bool()], model(sequence[None], placement=placement).logits[0])


@pytest.mark.parametrize("side", BEFORE)
@pytest.mark.parametrize("placement", PLACEMENTS)
@torch.no_grad()
def test_padding_may_hold_any_tokens(model: SupernetForCausalLM, placement: str, side: str) -> None:
    _, batch, mask = padded_batch(11, LENGTHS, BEFORE[side], WIDTH)
    other = torch.where(mask.bool(), batch, random_tokens(12, *batch.shape))
    assert not torch.equal(batch, other)
    keep = mask.bool()
    first, second = (model(b, attention_mask=mask, placement=placement).logits for b in (batch, other))
    assert_close(first[keep], second[keep], 1e-6)


@pytest.mark.parametrize("side", BEFORE)
@pytest.mark.parametrize("placement", PLACEMENTS)
def test_gradients_are_those_of_the_solo_runs(model: SupernetForCausalLM, placement: str, side: str) -> None:
    sequences, batch, mask = padded_batch(13, LENGTHS, BEFORE[side], WIDTH)
    weights = [torch.randn(len(s), model.config.vocab_size) for s in sequences]

    def gradients(loss: Tensor) -> list[Tensor]:
        used = [p for p in model.parameters()]
        found = torch.autograd.grad(loss, used, allow_unused=True)
        return [g for g in found if g is not None]

    logits = model(batch, attention_mask=mask, placement=placement).logits
    together = sum((logits[r][mask[r].bool()] * w).sum() for r, w in enumerate(weights))
    solo = (model(s[None], placement=placement).logits[0] for s in sequences)
    apart = sum((own * w).sum() for own, w in zip(solo, weights, strict=True))
    assert isinstance(together, Tensor) and isinstance(apart, Tensor)
    pairs = zip(gradients(together), gradients(apart), strict=True)
    assert max(relative_error(given, expected) for given, expected in pairs) < 1e-4


@pytest.mark.parametrize(
    "pieces", [[1] * WIDTH, [2, 7, WINDOW, WIDTH - 9 - WINDOW]], ids=["tokens", "uneven"]
)
@pytest.mark.parametrize("side", BEFORE)
@pytest.mark.parametrize("placement", PLACEMENTS)
@torch.no_grad()
def test_a_padded_batch_piece_by_piece_and_then_more_tokens(
    model: SupernetForCausalLM, placement: str, side: str, pieces: list[int]
) -> None:
    """Padding behind the prompt ends up between tokens; the window must not count it."""
    sequences, batch, mask = padded_batch(14, LENGTHS, BEFORE[side], WIDTH)
    more = random_tokens(15, len(LENGTHS), WINDOW + 2)
    batch = torch.cat([batch, more], dim=1)
    mask = torch.cat([mask, torch.ones_like(more)], dim=1)
    cache = model.new_cache(placement)
    logits, end = [], 0
    for piece in (*pieces, 1, WINDOW + 1):
        start, end = end, end + piece
        inputs = {"attention_mask": mask[:, :end], "past_key_values": cache, "placement": placement}
        logits.append(model(batch[:, start:end], **inputs).logits)
    together = torch.cat(logits, dim=1)
    for row, sequence in enumerate(sequences):
        whole = torch.cat([sequence, more[row]])[None]
        assert_close(together[row][mask[row].bool()], model(whole, placement=placement).logits[0])


@torch.no_grad()
def test_a_mask_without_padding_is_no_mask(model: SupernetForCausalLM) -> None:
    tokens = random_tokens(16, 2, 9)
    given = model(tokens, attention_mask=torch.ones(2, 9)).logits
    assert torch.equal(given, model(tokens).logits)


@torch.no_grad()
def test_a_row_without_any_token_disturbs_nobody(model: SupernetForCausalLM) -> None:
    tokens = random_tokens(17, 2, 9)
    mask = torch.tensor([[1] * 9, [0] * 9])
    for placement in PLACEMENTS:
        logits = model(tokens, attention_mask=mask, placement=placement).logits
        assert logits.isfinite().all()
        assert_close(logits[:1], model(tokens[:1], placement=placement).logits)


@torch.no_grad()
def test_mixer_outputs_of_a_padded_batch(model: SupernetForCausalLM) -> None:
    sequences, batch, mask = padded_batch(18, LENGTHS, BEFORE["left"], WIDTH)
    cache = model.new_cache("fa swa gdn kda")
    out = model(
        batch,
        attention_mask=mask,
        placement="fa swa gdn kda",
        output_mixer_outputs=True,
        past_key_values=cache,
    )
    assert out.mixer_outputs is not None and len(out.mixer_outputs) == LAYERS
    alone = model(sequences[1][None], placement="fa swa gdn kda", output_mixer_outputs=True).mixer_outputs
    for given, expected in zip(out.mixer_outputs, alone, strict=True):
        assert_close(given[1][mask[1].bool()], expected[0])

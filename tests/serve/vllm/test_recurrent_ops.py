"""The recurrent operations on a batch: against the supernet's own, and kernels against naive twins."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, cast

import pytest
import torch

from gearshift.serve.vllm.recurrent_ops import DeltaGates, NaiveOps, RecurrentMetadata
from gearshift.supernet.ops.delta_rule import delta_rule
from gearshift.supernet.ops.gated_norm import GatedRMSNorm
from gearshift.supernet.ops.short_convolution import short_convolution

PAGES, KEY_HEADS, HEADS, KEYS, VALUES, CHANNELS, TAPS = 9, 2, 4, 16, 32, 48, 4


def metadata(lengths: Sequence[int], continued: Sequence[bool]) -> RecurrentMetadata:
    starts = torch.tensor([0, *torch.tensor(lengths).cumsum(0)], dtype=torch.int32)
    pages = torch.arange(len(lengths)) * 2 + 2  # not in a row, and never the null page
    decode = all(continued) and max(lengths) == 1
    return RecurrentMetadata(starts, tuple(lengths), pages, torch.tensor(continued), decode)


def values(per_channel: bool) -> int:
    """Channels of a value; in Kimi Delta Attention, and so for its kernel, as many as of a key."""
    return KEYS if per_channel else VALUES


def rule_inputs(tokens: int, per_channel: bool) -> Any:
    torch.manual_seed(0)
    key_heads = HEADS if per_channel else KEY_HEADS
    q, k = torch.randn(2, tokens, key_heads, KEYS)
    v = torch.randn(tokens, HEADS, values(per_channel))
    decay = torch.randn(tokens, HEADS, *([KEYS] if per_channel else []))
    return q, k, v, decay, torch.randn(tokens, HEADS)


def gates(decay: torch.Tensor, strength: torch.Tensor) -> DeltaGates:
    """As mixers make them, with heads that forget at different speeds."""
    bias = torch.linspace(-2, 1, decay[0].numel())
    return DeltaGates(decay, strength, torch.linspace(-1, 0.5, HEADS), bias)


def run(ops: Any, inputs: Any, memory: torch.Tensor, batch: RecurrentMetadata) -> torch.Tensor:
    q, k, v, decay, strength = inputs
    return ops.delta_rule(q, k, v, gates(decay, strength), memory, batch)


def strided(*shape: int) -> torch.Tensor:
    """States as they lie in the pool: with room between the pages."""
    return torch.randn(PAGES, 2 * torch.Size(shape).numel())[:, : torch.Size(shape).numel()].view(
        PAGES, *shape
    )


@pytest.mark.parametrize("per_channel", [False, True])
def test_pieces_of_requests_give_what_whole_ones_give(per_channel):
    ops: Any = NaiveOps()
    inputs, rule = rule_inputs(60, per_channel), cast(Any, delta_rule)
    # What a new request's page may hold.
    memory = torch.full((PAGES, HEADS, values(per_channel), KEYS), float("nan"))
    q, k, v, decay, strength = inputs
    activated = (q, k, v, *gates(decay, strength).applied())
    whole = [rule(*(x[None, part] for x in activated), None) for part in (slice(0, 35), slice(35, 60))]
    first = [*range(30), *range(35, 55)]
    out = run(ops, [x[first] for x in inputs], memory, metadata([30, 20], [False, False]))
    rest = [*range(30, 35), *range(55, 60)]
    later = run(ops, [x[rest] for x in inputs], memory, metadata([5, 5], [True, True]))
    expected = torch.cat([out for out, _ in whole], dim=1)[0]
    torch.testing.assert_close(out, expected[first], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(later, expected[rest], atol=1e-5, rtol=1e-5)
    assert memory[[0, 1, 3]].isnan().all()


def test_convolutions_remember_their_inputs():
    torch.manual_seed(0)
    x, weight, bias = torch.randn(20, CHANNELS), torch.randn(CHANNELS, TAPS), torch.randn(CHANNELS)
    inputs = torch.full((PAGES, CHANNELS, TAPS - 1), float("nan"))
    whole = [
        short_convolution(x[None, part], weight, None, bias_C=bias)[0][0]
        for part in (slice(12), slice(12, 20))
    ]
    ops, first, rest = NaiveOps(), [*range(11), *range(12, 14)], [11, *range(14, 20)]
    out = ops.convolve(x[first], weight, bias, "silu", inputs, metadata([11, 2], [False, False]))
    later = ops.convolve(x[rest], weight, bias, "silu", inputs, metadata([1, 6], [True, True]))
    torch.testing.assert_close(out, torch.cat(whole)[first])
    torch.testing.assert_close(later, torch.cat(whole)[rest])


@pytest.fixture(scope="module")
def kernels() -> Any:
    if importlib.util.find_spec("vllm") is None:
        pytest.skip("vllm is not installed; tests/serve/vllm/rig says how")
    from gearshift.serve.vllm.recurrent_kernels import KernelOps

    if not torch.cuda.is_available():
        from gearshift_rig.kernels import let_interpret

        let_interpret()
    return KernelOps()


@pytest.mark.parametrize("per_channel", [False, True])
def test_decoding_kernels_against_the_naive_twins(kernels, per_channel):
    inputs, batch = rule_inputs(3, per_channel), metadata([1, 1, 1], [True] * 3)
    memory = strided(HEADS, values(per_channel), KEYS)
    naive_memory, kernel_memory = memory.clone(), memory
    naive: Any = NaiveOps()
    expected = run(naive, inputs, naive_memory, batch)
    found = run(kernels, inputs, kernel_memory, batch)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(kernel_memory, naive_memory, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("activation", ["silu", "none"])
@pytest.mark.parametrize("bias", [False, True])
def test_the_convolution_kernel_against_the_naive_twin(kernels, activation, bias):
    torch.manual_seed(0)
    x, weight = torch.randn(3, CHANNELS), torch.randn(CHANNELS, TAPS)
    biases = torch.randn(CHANNELS) if bias else None
    inputs, batch = strided(CHANNELS, TAPS - 1), metadata([1, 1, 1], [True] * 3)
    naive_inputs = inputs.clone()
    expected = NaiveOps().convolve(x, weight, biases, activation, naive_inputs, batch)
    found = kernels.convolve(x.clone(), weight, biases, activation, inputs, batch)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(inputs, naive_inputs)


@pytest.mark.parametrize("per_channel", [False, True])
def test_rows_that_only_fill_a_graph_up_change_no_state(kernels, per_channel):
    inputs, batch = rule_inputs(3, per_channel), metadata([1, 1, 1], [True] * 3)
    memory = strided(HEADS, values(per_channel), KEYS)
    before, alone = memory.clone(), memory.clone()
    # The third row is padding: no tokens of its own, and the null page.
    padded = replace(
        batch, starts=torch.tensor([0, 1, 2, 2], dtype=torch.int32), pages=torch.tensor([2, 4, 0])
    )
    found = run(kernels, inputs, memory, padded)
    expected = run(NaiveOps(), [x[:2] for x in inputs], alone, metadata([1, 1], [True] * 2))
    torch.testing.assert_close(found[:2], expected, atol=1e-5, rtol=1e-4)
    assert torch.equal(memory[[0, 1, 3, 5, 6]], before[[0, 1, 3, 5, 6]])


@pytest.mark.parametrize("activation", ["silu", "sigmoid"])
def test_the_gated_norm_kernel_against_the_naive_twin(kernels, activation):
    torch.manual_seed(0)
    norm = GatedRMSNorm(VALUES, 1e-5, activation)
    norm.weight.data.normal_()
    out, gate = torch.randn(3, HEADS, VALUES), torch.randn(3, 2 * HEADS * VALUES)[:, : HEADS * VALUES]
    gate = gate.unflatten(-1, (HEADS, VALUES))
    torch.testing.assert_close(kernels.gated_norm(out, gate, norm), NaiveOps().gated_norm(out, gate, norm))


@pytest.mark.parametrize("per_channel", [False, True])
def test_the_chunked_kernels_against_the_naive_twins(kernels, per_channel):
    lengths, continued = [70, 1, 33], [False, True, True]
    inputs, batch = rule_inputs(sum(lengths), per_channel), metadata(lengths, continued)
    inputs = [x.half() for x in inputs[:3]] + list(inputs[3:])
    memory = strided(HEADS, values(per_channel), KEYS)
    memory[2] = float("nan")  # what a new request's page may hold
    naive_memory = memory.clone()
    expected = run(NaiveOps(), inputs, naive_memory, batch)
    found = run(kernels, inputs, memory, batch)
    torch.testing.assert_close(found, expected, atol=4e-3, rtol=4e-3)
    torch.testing.assert_close(memory, naive_memory, atol=4e-3, rtol=4e-3)


@pytest.mark.parametrize("activation", ["silu", "none"])
@pytest.mark.parametrize("bias", [False, True])
def test_the_convolution_kernel_of_prompts_against_the_naive_twin(kernels, activation, bias):
    torch.manual_seed(0)
    lengths, continued = [19, 1, 2, 40], [False, True, False, True]
    # As a mixer gives it: some of the columns of a larger product.
    x, weight = torch.randn(sum(lengths), CHANNELS + 16)[:, :CHANNELS], torch.randn(CHANNELS, TAPS)
    biases = torch.randn(CHANNELS) if bias else None
    inputs, batch = strided(CHANNELS, TAPS - 1), metadata(lengths, continued)
    inputs[2] = float("nan")
    naive_inputs = inputs.clone()
    expected = NaiveOps().convolve(x, weight, biases, activation, naive_inputs, batch)
    found = kernels.convolve(x, weight, biases, activation, inputs, batch)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(inputs, naive_inputs)

"""Which form of a delta rule runs, and the GPU kernels against the naive twin."""

from __future__ import annotations

import importlib.util

import pytest
import torch
from torch import Tensor

from gearshift.supernet.ops.delta_rule import CHUNK_TOKENS, RECURRENT_TOKENS, delta_rule
from gearshift.supernet.ops.naive import chunk_delta_rule, recurrent_delta_rule
from tests.supernet.tools import relative_error

HAS_KERNELS = torch.cuda.is_available() and importlib.util.find_spec("fla") is not None
needs_kernels = pytest.mark.skipif(not HAS_KERNELS, reason="needs a CUDA device and flash-linear-attention")
NAMES = ("q", "k", "v", "g", "beta", "state")


def make_inputs(
    seed: int, length: int, per_channel: bool, dims: int = 16, key_heads: int = 4
) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    q, k = (torch.randn(2, length, key_heads, dims, generator=generator) for _ in range(2))
    v = torch.randn(2, length, 4, dims, generator=generator)
    g = -torch.rand(2, length, 4, *([dims] if per_channel else []), generator=generator)
    beta = torch.rand(2, length, 4, generator=generator)
    return [q, k, v, g, beta, torch.randn(2, 4, dims, dims, generator=generator)]


@pytest.mark.parametrize("per_channel", [False, True], ids=["scalar", "channel"])
def test_few_tokens_run_one_by_one_and_many_in_chunks(per_channel: bool) -> None:
    few = make_inputs(0, RECURRENT_TOKENS, per_channel)
    assert torch.equal(delta_rule(*few)[0], recurrent_delta_rule(*few)[0])
    many = make_inputs(1, 70, per_channel)
    out, state = delta_rule(*many)
    expected, expected_state = chunk_delta_rule(*many, chunk_size=CHUNK_TOKENS)
    assert torch.equal(out, expected)
    assert torch.equal(state, expected_state)


@needs_kernels
@pytest.mark.parametrize("key_heads", [4, 2])
@pytest.mark.parametrize("per_channel", [False, True], ids=["scalar", "channel"])
@pytest.mark.parametrize("length", [1, 64, 130])
def test_kernels_equal_the_twin(length: int, per_channel: bool, key_heads: int) -> None:
    if per_channel and key_heads != 4:
        pytest.skip("Kimi's heads are not grouped")
    made = make_inputs(length, length, per_channel, dims=64, key_heads=key_heads)
    low = [x.cuda().bfloat16() if i in (0, 1, 2) else x.cuda() for i, x in enumerate(made)]
    ours, theirs = ([x.detach().clone().requires_grad_() for x in low] for _ in range(2))
    out, state = delta_rule(*ours)
    expected, expected_state = recurrent_delta_rule(*theirs)
    assert relative_error(out, expected) < 1e-2
    assert relative_error(state, expected_state) < 1e-2
    weights = torch.randn(out.shape, generator=torch.Generator().manual_seed(2)).to(out)
    gradients = torch.autograd.grad((out * weights).sum(), ours)
    wanted = torch.autograd.grad((expected * weights).sum(), theirs)
    for name, gradient, reference in zip(NAMES, gradients, wanted, strict=True):
        assert relative_error(gradient, reference) < 1e-2, name


@needs_kernels
@pytest.mark.parametrize("per_channel", [False, True], ids=["scalar", "channel"])
@torch.no_grad()
def test_the_decoding_kernel_equals_the_twin(per_channel: bool) -> None:
    made = make_inputs(3, 1, per_channel, dims=64)
    low = [x.cuda().bfloat16() if i in (0, 1, 2) else x.cuda() for i, x in enumerate(made)]
    for given, expected in zip(delta_rule(*low), recurrent_delta_rule(*low), strict=True):
        assert relative_error(given, expected) < 1e-2

"""Both delta rules against the plain torch code that Transformers ships for Qwen3-Next and Kimi Linear."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from transformers.models.kimi_linear import modeling_kimi_linear as kimi
from transformers.models.qwen3_next import modeling_qwen3_next as qwen

from gearshift.supernet.ops.delta_rule import delta_rule
from gearshift.supernet.ops.naive import chunk_delta_rule, recurrent_delta_rule
from tests.supernet.tools import relative_error

Form = Callable[..., tuple[Tensor, Tensor]]
TWINS: dict[str, Form] = {
    "recurrent": recurrent_delta_rule,
    "chunk": lambda *inputs: chunk_delta_rule(*inputs, chunk_size=32),
    "chosen": delta_rule,
}
THEIRS = {
    ("scalar", "chunk"): qwen.torch_chunk_gated_delta_rule,
    ("scalar", "recurrent"): qwen.torch_recurrent_gated_delta_rule,
    ("channel", "chunk"): kimi.chunk_kimi_delta_attention,
    ("channel", "recurrent"): kimi.recurrent_kimi_delta_attention,
}
NAMES = ("q", "k", "v", "g", "beta", "state")


def make_inputs(seed: int, length: int, decay: str) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    heads = 2, length, 4
    # Kimi's heads are not grouped.
    key_heads = 2 if decay == "scalar" else 4
    q, k = (torch.randn(2, length, key_heads, 16, generator=generator) for _ in range(2))
    v = torch.randn(*heads, 24, generator=generator)
    g = -torch.rand(*heads, *([16] if decay == "channel" else []), generator=generator)
    beta = torch.rand(*heads, generator=generator)
    state = torch.randn(2, 4, 16, 24, generator=generator)
    return [x.requires_grad_() for x in (q, k, v, g, beta, state)]


@pytest.mark.parametrize("twin", TWINS)
@pytest.mark.parametrize(("decay", "theirs"), THEIRS)
@pytest.mark.parametrize("length", [1, 64, 101])
def test_twin_equals_transformers(length: int, decay: str, theirs: str, twin: str) -> None:
    inputs = make_inputs(length, length, decay)
    q, k, v, g, beta, state = inputs
    out, last = TWINS[twin](*inputs)
    expected, expected_last = THEIRS[decay, theirs](
        q, k, v, g=g, beta=beta, initial_state=state, output_final_state=True, use_qk_l2norm_in_kernel=True
    )
    assert relative_error(out, expected) < 1e-5
    assert relative_error(last, expected_last) < 1e-5
    weights = torch.randn(out.shape, generator=torch.Generator().manual_seed(1))
    gradients = torch.autograd.grad((out * weights).sum(), inputs)
    expected_gradients = torch.autograd.grad((expected * weights).sum(), inputs)
    for name, gradient, theirs_gradient in zip(NAMES, gradients, expected_gradients, strict=True):
        assert relative_error(gradient, theirs_gradient) < 1e-4, name

"""The whole mixer against Transformers' KimiLinearDeltaAttention, with one convolution for q, k and v."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from transformers.models.kimi_linear.configuration_kimi_linear import KimiLinearConfig
from transformers.models.kimi_linear.modeling_kimi_linear import KimiLinearDeltaAttention

from gearshift.supernet.context import SequenceContext
from gearshift.supernet.mixers.kimi_delta_attention import KimiDeltaAttention
from tests.supernet.tools import randomize, relative_error, tiny_config

HIDDEN, HEADS, HEAD_DIM = 32, 3, 10
CONTEXT = SequenceContext((torch.empty(0), torch.empty(0)), past=0)


@torch.no_grad()
def their_mixer(ours: KimiDeltaAttention) -> KimiLinearDeltaAttention:
    config = KimiLinearConfig(
        hidden_size=HIDDEN,
        linear_num_heads=HEADS,
        linear_head_dim=HEAD_DIM,
        linear_conv_kernel_dim=4,
        rms_norm_eps=1e-5,
        num_hidden_layers=1,
        layer_types=["linear_attention"],
        mlp_layer_types=["dense"],
    )
    theirs = KimiLinearDeltaAttention(config, 0)
    weights: dict[str, Tensor] = dict(ours.named_parameters())
    convolutions = [weights.pop(f"{part}_conv1d.weight") for part in "qkv"]
    theirs.conv1d.weight.copy_(torch.cat(convolutions))
    if ours.mixer_config.conv_bias:
        biases = torch.cat([weights.pop(f"{part}_conv1d.bias") for part in "qkv"])
        theirs.conv1d.bias = torch.nn.Parameter(biases)
    for name in ("f_a_proj.weight", "f_b_proj.weight", "A_log", "dt_bias"):
        parameter = theirs.get_parameter(f"forget_gate.{name}")
        parameter.copy_(weights.pop(name).view_as(parameter))
    for name, weight in weights.items():
        theirs.get_parameter(name).copy_(weight)
    return theirs


@pytest.mark.parametrize("conv_bias", [False, True], ids=["plain", "bias"])
@pytest.mark.parametrize("length", [1, 6, 64, 70])
def test_equals_transformers(length: int, conv_bias: bool) -> None:
    torch.manual_seed(length)
    # Kimi's low-rank gates have the rank of a head.
    sizes = {"num_heads": HEADS, "head_dim": HEAD_DIM, "gate_rank": HEAD_DIM, "conv_bias": conv_bias}
    config = tiny_config(["kimi_delta_attention"], {"kimi_delta_attention": sizes})
    ours = KimiDeltaAttention(config, config.mixer_config("kimi_delta_attention"))
    ours.initialize()
    randomize(ours)
    theirs = their_mixer(ours)
    x = torch.randn(2, length, HIDDEN, requires_grad=True)
    given, expected = ours(x, CONTEXT, None), theirs(x)
    assert relative_error(given, expected) < 1e-5
    weights = torch.randn_like(given)
    gradient = torch.autograd.grad((given * weights).sum(), x)[0]
    assert relative_error(gradient, torch.autograd.grad((expected * weights).sum(), x)[0]) < 1e-4

"""The whole mixer against Transformers' Qwen3NextGatedDeltaNet, with projections interleaved by key head."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers.models.qwen3_next.configuration_qwen3_next import Qwen3NextConfig
from transformers.models.qwen3_next.modeling_qwen3_next import Qwen3NextGatedDeltaNet

from gearshift.supernet.context import SequenceContext
from gearshift.supernet.mixers.gated_delta_net import GatedDeltaNet, initialize_decay
from tests.supernet.tools import randomize, relative_error, tiny_config

HIDDEN = 32
CONTEXT = SequenceContext((torch.empty(0), torch.empty(0)), past=0)


def interleaved(parts: list[Tensor], key_heads: int) -> Tensor:
    """Rows of each part, heads outer, regrouped so that a key head's rows of all parts follow each other."""
    return torch.cat([part.unflatten(0, (key_heads, -1)) for part in parts], dim=1).flatten(0, 1)


@torch.no_grad()
def their_mixer(
    ours: GatedDeltaNet, key_heads: int, key_dim: int, heads: int, value_dim: int
) -> Qwen3NextGatedDeltaNet:
    config = Qwen3NextConfig(
        hidden_size=HIDDEN,
        linear_num_key_heads=key_heads,
        linear_key_head_dim=key_dim,
        linear_num_value_heads=heads,
        linear_value_head_dim=value_dim,
        linear_conv_kernel_dim=4,
        rms_norm_eps=1e-5,
        num_hidden_layers=1,
        layer_types=["linear_attention"],
    )
    theirs = Qwen3NextGatedDeltaNet(config, 0)
    keys, values = key_heads * key_dim, heads * value_dim
    qkvz = ours.get_parameter("in_proj_qkvz.weight").split([keys, keys, values, values])
    ba = ours.get_parameter("in_proj_ba.weight").chunk(2)
    theirs.get_parameter("in_proj_qkvz.weight").copy_(interleaved(list(qkvz), key_heads))
    theirs.get_parameter("in_proj_ba.weight").copy_(interleaved(list(ba), key_heads))
    for name in ("conv1d.weight", "A_log", "dt_bias", "norm.weight", "out_proj.weight"):
        theirs.get_parameter(name).copy_(ours.get_parameter(name))
    theirs.activation = {"silu": "silu", "none": "linear"}[ours.mixer_config.conv_activation]
    bias = dict(ours.named_parameters()).get("conv1d.bias")
    theirs.conv1d.bias = None if bias is None else torch.nn.Parameter(bias.clone())
    return theirs


OPTIONS = ({}, {"conv_bias": True}, {"conv_bias": True, "conv_activation": "none"})


@pytest.mark.parametrize("options", OPTIONS, ids=["plain", "bias", "bias, linear"])
@pytest.mark.parametrize(("key_heads", "heads"), [(2, 2), (2, 6)], ids=["one value head a key", "three"])
@pytest.mark.parametrize("length", [1, 6, 64, 70])
def test_equals_transformers(length: int, key_heads: int, heads: int, options: dict[str, Any]) -> None:
    torch.manual_seed(length + heads)
    sizes = {
        "num_heads": heads,
        "num_key_heads": key_heads,
        "key_head_dim": 6,
        "value_head_dim": 10,
        **options,
    }
    config = tiny_config(["gated_delta_net"], {"gated_delta_net": sizes})
    ours = GatedDeltaNet(config, config.mixer_config("gated_delta_net"))
    ours.initialize()
    randomize(ours)
    theirs = their_mixer(ours, key_heads, 6, heads, 10)
    x = torch.randn(2, length, HIDDEN, requires_grad=True)
    given, expected = ours(x, CONTEXT, None), theirs(x)
    assert relative_error(given, expected) < 1e-5
    weights = torch.randn_like(given)
    gradient = torch.autograd.grad((given * weights).sum(), x)[0]
    assert relative_error(gradient, torch.autograd.grad((expected * weights).sum(), x)[0]) < 1e-4


def test_decay_starts_in_the_papers_range() -> None:
    torch.manual_seed(0)
    a_log, dt_bias = torch.zeros(4000), torch.zeros(4000)
    initialize_decay(a_log, dt_bias)
    rate, step = a_log.exp(), torch.nn.functional.softplus(dt_bias)
    assert 1 <= rate.min() < 1.1 and 15.9 < rate.max() <= 16
    assert 0.99e-3 < step.min() < 1.1e-3 and 0.09 < step.max() < 0.101
    assert abs(step.log().mean() - torch.tensor([1e-3, 1e-1]).log().mean()) < 0.1

"""Which part of a weight each rank gets, and that a checkpoint is complete."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("vllm", reason="vllm is not installed; tests/serve/vllm/rig says how")

import torch
from torch import nn
from vllm.config import VllmConfig, set_current_vllm_config
from vllm.model_executor import parameter
from vllm.model_executor.layers import linear
from vllm.model_executor.layers.linear import MergedColumnParallelLinear, QKVParallelLinear, RowParallelLinear

from gearshift.errors import CheckpointError
from gearshift.serve.vllm import delta_mixers, shards
from gearshift.serve.vllm.delta_mixers import GatedDeltaNetMixer, KimiDeltaAttentionMixer
from gearshift.serve.vllm.weights import destination, load_weights
from gearshift.supernet import SupernetForCausalLM, load_supernet

RANKS = 2


@pytest.fixture
def on_rank(monkeypatch) -> Iterator[Callable[[int], None]]:
    """Makes the modules believe that they are one of two ranks."""

    def become(rank: int) -> None:
        for module in (linear, parameter, shards, delta_mixers):
            monkeypatch.setattr(module, "get_tensor_model_parallel_world_size", lambda: RANKS, raising=False)
            monkeypatch.setattr(module, "get_tensor_model_parallel_rank", lambda: rank, raising=False)

    with set_current_vllm_config(VllmConfig()):
        yield become


@pytest.fixture(scope="module")
def whole(served_directory: Path) -> SupernetForCausalLM:
    return load_supernet(served_directory)


def own(weight: torch.Tensor, rank: int, *sections: int) -> torch.Tensor:
    """A rank's part of joined sections, as it should be."""
    return torch.cat([part.chunk(RANKS)[rank] for part in weight.split(list(sections))])


def loaded(module: nn.Module, weights: dict[str, torch.Tensor], kind: str) -> dict[str, torch.Tensor]:
    """Load a whole mixer's weights into the module of a rank."""
    holder = nn.Module()
    holder.mixers = nn.ModuleDict({kind: module})
    model = nn.Module()
    model.layers = nn.ModuleList([holder])
    named = [(f"layers.0.mixers.{kind}.{name}", tensor) for name, tensor in weights.items()]
    load_weights(model, named, tied=False)
    return dict(module.named_parameters())


@pytest.mark.parametrize("rank", [0, 1])
def test_gated_delta_net_is_cut_by_queries_keys_values_and_gates(on_rank, whole, rank):
    on_rank(rank)
    mixer: Any = whole.model.layers[0].mixers["gated_delta_net"]
    config = whole.config.mixer_config("gated_delta_net", 0)
    keys, values = config.num_key_heads * config.key_head_dim, config.num_heads * config.value_head_dim
    module = GatedDeltaNetMixer(whole.config, config, "gdn", torch.device("cpu"))
    found = loaded(module, mixer.state_dict(), "gated_delta_net")
    expected = {
        "in_proj_qkvz.weight": own(mixer.in_proj_qkvz.weight, rank, keys, keys, values, values),
        "in_proj_ba.weight": own(mixer.in_proj_ba.weight, rank, config.num_heads, config.num_heads),
        "conv.weight": own(mixer.conv1d.weight, rank, keys, keys, values)[:, 0],
        "A_log": own(mixer.A_log, rank, config.num_heads),
        "dt_bias": own(mixer.dt_bias, rank, config.num_heads),
        "norm.weight": mixer.norm.weight,
        "out_proj.weight": mixer.out_proj.weight.chunk(RANKS, dim=1)[rank],
    }
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(found[name], value), name


@pytest.mark.parametrize("rank", [0, 1])
def test_kimi_delta_attention_is_cut_by_heads(on_rank, whole, rank):
    on_rank(rank)
    mixer: Any = whole.model.layers[0].mixers["kimi_delta_attention"]
    config = whole.config.mixer_config("kimi_delta_attention", 0)
    size = config.num_heads * config.head_dim
    module = KimiDeltaAttentionMixer(whole.config, config, "kda", torch.device("cpu"))
    found = loaded(module, mixer.state_dict(), "kimi_delta_attention")
    joined = torch.cat([mixer.q_proj.weight, mixer.k_proj.weight, mixer.v_proj.weight])
    filters = torch.cat([mixer.q_conv1d.weight, mixer.k_conv1d.weight, mixer.v_conv1d.weight])
    expected = {
        "qkv_proj.weight": own(joined, rank, size, size, size),
        "conv.weight": own(filters, rank, size, size, size)[:, 0],
        "o_proj.weight": mixer.o_proj.weight.chunk(RANKS, dim=1)[rank],
        "o_norm.weight": mixer.o_norm.weight,
        **{f"{name}.weight": getattr(mixer, name).weight for name in ("f_a_proj", "g_a_proj")},
        **{
            f"{name}.weight": getattr(mixer, name).weight.chunk(RANKS)[rank]
            for name in ("f_b_proj", "g_b_proj", "b_proj")
        },
        "A_log": own(mixer.A_log, rank, config.num_heads),
        "dt_bias": own(mixer.dt_bias, rank, size),
    }
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(found[name], value), name


def test_attention_and_ffn_go_through_vllms_own_loaders(on_rank):
    on_rank(1)
    qkv = QKVParallelLinear(8, 4, 4, 2, bias=False)
    q, k, v = torch.randn(16, 8), torch.randn(8, 8), torch.randn(8, 8)
    for part, weight in zip("qkv", (q, k, v), strict=True):
        qkv.weight.weight_loader(qkv.weight, weight, part)
    assert torch.equal(qkv.weight, torch.cat([x.chunk(2)[1] for x in (q, k, v)]))
    up = MergedColumnParallelLinear(8, [6, 6], bias=False)
    for part in range(2):
        up.weight.weight_loader(up.weight, torch.full((6, 8), float(part)), part)
    assert up.weight.tolist() == [[0.0] * 8] * 3 + [[1.0] * 8] * 3
    down = RowParallelLinear(6, 8, bias=False)
    weight = torch.randn(8, 6)
    down.weight.weight_loader(down.weight, weight)
    assert torch.equal(down.weight, weight[:, 3:])


def test_a_checkpoint_that_lacks_a_part_or_has_a_stranger_is_refused(on_rank, whole):
    on_rank(0)
    config = whole.config.mixer_config("kimi_delta_attention", 0)
    mixer: Any = whole.model.layers[0].mixers["kimi_delta_attention"]
    weights = mixer.state_dict()
    for gone, said in (("k_proj.weight", r"qkv_proj.weight \(1\)"), ("A_log", "A_log")):
        module = KimiDeltaAttentionMixer(whole.config, config, "kda", torch.device("cpu"))
        with pytest.raises(CheckpointError, match=said):
            loaded(
                module,
                {name: weight for name, weight in weights.items() if name != gone},
                "kimi_delta_attention",
            )
    with pytest.raises(CheckpointError, match="nothing of this supernet"):
        destination("model.layers.0.mlp.strange.weight", {})

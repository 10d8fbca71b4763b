"""The published recipe, with its mistakes: for ablations only.

It does what ``plan_dil_attention_to_gdn`` (DIL), ``plan_kil_attention_to_kda`` (KIL) and the constants of
``Init`` do in ServiceNow/Fast-LLM, ``fast_llm_external_models/apriel2/conversion/converters.py`` and
``expr.py``. Reproduced:

- Key/value head ``h mod G`` goes with query head h, where the teacher has ``h // (H / G)``: with 32 query and
  8 key/value heads 28 of 32 heads are mispaired.
- Gated DeltaNet gets as many query and key heads as the teacher has key/value heads: the first G query heads.
  Value head h, made of value head ``h mod G``, uses query and key head ``h // (H / G)``.
- Gated DeltaNet's output gate is SiLU of zero: the layer adds nothing, and only the gate has a gradient.
- Biases, and the weights of query and key norms, are dropped.
- The convolutions pass half of the current token.
- All decay at one rate, ``0.1 softplus(0)`` a token: to 1/e in 14 tokens. Gated DeltaNet's does not depend on
  the input; Kimi Delta Attention's low-rank gates, its output gate (SiLU) and its write strengths are random,
  uniform within the inverse square root of their inputs' count.
- The output projection is the teacher's, whatever size the norm before it gives the heads.

Shape letters: D hidden size, H query heads, G key/value heads, K head size.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from gearshift.convert.initialize.attention import TeacherAttention
from gearshift.convert.initialize.base import copied_fields
from gearshift.placement import GATED_DELTA_NET, KIMI_DELTA_ATTENTION
from gearshift.supernet.config import SupernetConfig

TAP = 0.5
DECAY_RATE = 0.1


@dataclass(frozen=True)
class Modulo:
    """See the module; an :class:`~gearshift.convert.initialize.base.Initializer`."""

    name: str = "modulo"

    def mixer_fields(self, mixer: str, attention_fields: Mapping[str, Any], window: int) -> dict[str, Any]:
        """See :class:`~gearshift.convert.initialize.base.Initializer`."""
        heads, head_dim = attention_fields["num_heads"], attention_fields["head_dim"]
        if mixer == GATED_DELTA_NET:
            return {
                "num_heads": heads,
                "num_key_heads": attention_fields["num_key_value_heads"],
                "key_head_dim": head_dim,
                "value_head_dim": head_dim,
            }
        if mixer == KIMI_DELTA_ATTENTION:
            sizes = {"num_heads": heads, "head_dim": head_dim, "gate_rank": head_dim}
            return {**sizes, "gate_activation": "silu"}
        return copied_fields(mixer, attention_fields, window)

    def tensors(
        self,
        mixer: str,
        config: SupernetConfig,
        layer: int,
        attention: TeacherAttention,
        generator: torch.Generator,
    ) -> dict[str, Tensor]:
        """See :class:`~gearshift.convert.initialize.base.Initializer`."""
        if mixer == GATED_DELTA_NET:
            return _gated_delta_net(config, layer, attention)
        assert mixer == KIMI_DELTA_ATTENTION
        return _kimi_delta_attention(config, layer, attention, generator)


def _gated_delta_net(config: SupernetConfig, layer: int, attention: TeacherAttention) -> dict[str, Tensor]:
    sizes = config.mixer_config(GATED_DELTA_NET, layer)
    heads, groups = attention.num_heads, attention.num_key_value_heads
    q = attention.projection("q_proj").select(torch.arange(groups)).weight
    k = attention.k_proj
    v = _tiled(attention, "v_proj")
    return {
        "in_proj_qkvz.weight": torch.cat([q, k, v, torch.zeros_like(v)]),
        "in_proj_ba.weight": torch.zeros(2 * heads, k.shape[1]),
        "conv1d.weight": _half_of_the_current_token(2 * len(k) + len(v), sizes.conv_kernel),
        "A_log": torch.full((heads,), math.log(DECAY_RATE)),
        "dt_bias": torch.zeros(heads),
        "norm.weight": torch.ones(attention.head_dim),
        "out_proj.weight": attention.o_proj,
    }


def _kimi_delta_attention(
    config: SupernetConfig, layer: int, attention: TeacherAttention, generator: torch.Generator
) -> dict[str, Tensor]:
    sizes = config.mixer_config(KIMI_DELTA_ATTENTION, layer)
    size, hidden = attention.q_proj.shape
    tensors = {
        "q_proj.weight": attention.q_proj,
        "k_proj.weight": _tiled(attention, "k_proj"),
        "v_proj.weight": _tiled(attention, "v_proj"),
        "A_log": torch.full((attention.num_heads,), math.log(DECAY_RATE)),
        "dt_bias": torch.zeros(size),
        "o_norm.weight": torch.ones(attention.head_dim),
        "o_proj.weight": attention.o_proj,
        "b_proj.weight": _uniform(attention.num_heads, hidden, generator),
    }
    for part in "qkv":
        tensors[f"{part}_conv1d.weight"] = _half_of_the_current_token(size, sizes.conv_kernel)
    for gate in "fg":
        tensors[f"{gate}_a_proj.weight"] = _uniform(sizes.gate_rank, hidden, generator)
        tensors[f"{gate}_b_proj.weight"] = _uniform(size, sizes.gate_rank, generator)
    return tensors


def _tiled(attention: TeacherAttention, name: str) -> Tensor:
    """Key or value heads 0, 1, ... G - 1, 0, 1, ... for the query heads in turn, (H K, D)."""
    heads = torch.arange(attention.num_heads) % attention.num_key_value_heads
    return attention.projection(name).select(heads).weight


def _half_of_the_current_token(channels: int, taps: int) -> Tensor:
    weight = torch.zeros(channels, 1, taps)
    weight[:, :, -1] = TAP
    return weight


def _uniform(rows: int, columns: int, generator: torch.Generator) -> Tensor:
    return (2 * torch.rand(rows, columns, generator=generator) - 1) * columns**-0.5

"""Gated DeltaNet and Kimi Delta Attention, sharded over heads, around `gearshift.serve.vllm.recurrent_ops`.

Letters: N tokens, D channels of the model, C channels of the short convolutions, H value heads, G query and
key heads, K key channels, V value channels; all but D and N are those of one tensor-parallel rank.
"""

from __future__ import annotations

from abc import abstractmethod

import torch
from torch import Tensor, nn
from vllm.distributed import get_tensor_model_parallel_world_size
from vllm.forward_context import get_forward_context
from vllm.model_executor.layers.linear import (
    ColumnParallelLinear,
    MergedColumnParallelLinear,
    ReplicatedLinear,
    RowParallelLinear,
)

from gearshift.serve.vllm.geometry import StateShape
from gearshift.serve.vllm.recurrent_ops import DeltaGates, RecurrentMetadata, recurrent_ops
from gearshift.serve.vllm.shards import sharded_parameter
from gearshift.supernet.config import SupernetConfig
from gearshift.supernet.mixer_configs import GatedDeltaNetConfig, KimiDeltaAttentionConfig
from gearshift.supernet.ops.gated_norm import GatedRMSNorm

# Where the weights of a checkpoint go, as for attention: those whose names or parts differ.
GDN_MERGED = {"conv1d": ("conv", None)}
KDA_MERGED = {
    "q_proj": ("qkv_proj", 0),
    "k_proj": ("qkv_proj", 1),
    "v_proj": ("qkv_proj", 2),
    "q_conv1d": ("conv", 0),
    "k_conv1d": ("conv", 1),
    "v_conv1d": ("conv", 2),
}


class ShortConvolution(nn.Module):
    """The filters, (C, taps), and biases of a mixer's channels on this rank."""

    def __init__(self, sections: list[int], taps: int, bias: bool) -> None:
        super().__init__()
        self.weight = sharded_parameter(sections, taps)
        self.bias = sharded_parameter(sections) if bias else None


class DeltaMixer(nn.Module):
    """What both have in common. The result is this rank's part of the sum over ranks.

    Attributes:
        state_pages: all states of the pool, as `gearshift.serve.vllm.pool.state_pages` gives them; set when
            the pool is there.
    """

    conv: ShortConvolution
    activation: str = "silu"

    def __init__(
        self, mixer: GatedDeltaNetConfig | KimiDeltaAttentionConfig, prefix: str, device: torch.device
    ) -> None:
        super().__init__()
        self.ranks = get_tensor_model_parallel_world_size()
        self.prefix = prefix
        self.state_shape = StateShape.of(mixer, self.ranks)
        self.state_pages: tuple[Tensor, Tensor] | None = None
        self.ops = recurrent_ops(device)

    def forward(self, x_ND: Tensor, positions_N: Tensor) -> Tensor:
        """This rank's part of the mixer's output, (N, D); zeros when memory is being measured."""
        context = get_forward_context().attn_metadata
        qkv, gate = self.inputs(x_ND)
        if context is None or self.state_pages is None:
            return torch.zeros_like(x_ND)
        assert isinstance(context, dict)
        metadata: RecurrentMetadata = context[self.prefix]  # pyright: ignore[reportAssignmentType]
        memory, inputs = self.state_pages
        qkv = self.ops.convolve(qkv, self.conv.weight, self.conv.bias, self.activation, inputs, metadata)
        q, k, v = self.split_heads(qkv)
        out = self.ops.delta_rule(q, k, v, self.gates(x_ND), memory, metadata)
        return self.project(self.ops.gated_norm(out, gate, self.output_norm).flatten(1))

    @abstractmethod
    def inputs(self, x_ND: Tensor) -> tuple[Tensor, Tensor]:
        """What the convolutions read, (N, C), and what gates the output, (N, H, V)."""

    @abstractmethod
    def split_heads(self, qkv_NC: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries and keys (N, G, K), values (N, H, V)."""

    @abstractmethod
    def gates(self, x_ND: Tensor) -> DeltaGates:
        """Decay and write strength."""

    @property
    @abstractmethod
    def output_norm(self) -> GatedRMSNorm:
        """What gates and normalises each head."""

    @abstractmethod
    def project(self, out_NC: Tensor) -> Tensor:
        """This rank's part of the output, (N, D)."""


class GatedDeltaNetMixer(DeltaMixer):
    """Gated DeltaNet. Rows of its joined projections as in the supernet, each part shared out on its own."""

    def __init__(
        self, config: SupernetConfig, mixer: GatedDeltaNetConfig, prefix: str, device: torch.device
    ) -> None:
        super().__init__(mixer, prefix, device)
        assert config.hidden_size is not None
        keys, values = mixer.num_key_heads * mixer.key_head_dim, mixer.num_heads * mixer.value_head_dim
        self.key_dim, self.value_dim = mixer.key_head_dim, mixer.value_head_dim
        self.sizes = [keys // self.ranks, keys // self.ranks, values // self.ranks]
        self.activation = mixer.conv_activation
        self.in_proj_qkvz = MergedColumnParallelLinear(
            config.hidden_size, [keys, keys, values, values], bias=False, prefix=f"{prefix}.in_proj_qkvz"
        )
        self.in_proj_ba = MergedColumnParallelLinear(
            config.hidden_size, [mixer.num_heads] * 2, bias=False, prefix=f"{prefix}.in_proj_ba"
        )
        self.conv = ShortConvolution([keys, keys, values], mixer.conv_kernel, mixer.conv_bias)
        self.A_log = sharded_parameter([mixer.num_heads], dtype=torch.float32)
        self.dt_bias = sharded_parameter([mixer.num_heads], dtype=torch.float32)
        self.norm = GatedRMSNorm(mixer.value_head_dim, mixer.norm_eps, mixer.gate_activation)
        self.out_proj = RowParallelLinear(
            values, config.hidden_size, bias=False, reduce_results=False, prefix=f"{prefix}.out_proj"
        )

    def inputs(self, x_ND: Tensor) -> tuple[Tensor, Tensor]:
        """See `DeltaMixer`; both come from one product."""
        qkv, z = self.in_proj_qkvz(x_ND)[0].split([sum(self.sizes), self.sizes[2]], dim=-1)
        return qkv, z.unflatten(-1, (-1, self.value_dim))

    def split_heads(self, qkv_NC: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """See `DeltaMixer`."""
        q, k, v = qkv_NC.split(self.sizes, dim=-1)
        dims = (self.key_dim, self.key_dim, self.value_dim)
        q, k, v = (x.unflatten(-1, (-1, dim)) for x, dim in zip((q, k, v), dims, strict=True))
        return q, k, v

    def gates(self, x_ND: Tensor) -> DeltaGates:
        """See `DeltaMixer`."""
        b, a = self.in_proj_ba(x_ND)[0].chunk(2, dim=-1)
        return DeltaGates(a, b, self.A_log, self.dt_bias)

    @property
    def output_norm(self) -> GatedRMSNorm:
        """See `DeltaMixer`."""
        return self.norm

    def project(self, out_NC: Tensor) -> Tensor:
        """See `DeltaMixer`."""
        return self.out_proj(out_NC)[0]


class KimiDeltaAttentionMixer(DeltaMixer):
    """Kimi Delta Attention. The narrow halves of the low-rank projections are whole on every rank."""

    def __init__(
        self, config: SupernetConfig, mixer: KimiDeltaAttentionConfig, prefix: str, device: torch.device
    ) -> None:
        super().__init__(mixer, prefix, device)
        assert config.hidden_size is not None
        hidden, size, rank = config.hidden_size, mixer.num_heads * mixer.head_dim, mixer.gate_rank
        self.head_dim = mixer.head_dim
        self.qkv_proj = MergedColumnParallelLinear(
            hidden, [size] * 3, bias=False, prefix=f"{prefix}.qkv_proj"
        )
        self.conv = ShortConvolution([size] * 3, mixer.conv_kernel, mixer.conv_bias)
        self.f_a_proj = ReplicatedLinear(hidden, rank, bias=False, prefix=f"{prefix}.f_a_proj")
        self.f_b_proj = ColumnParallelLinear(rank, size, bias=False, prefix=f"{prefix}.f_b_proj")
        self.g_a_proj = ReplicatedLinear(hidden, rank, bias=False, prefix=f"{prefix}.g_a_proj")
        self.g_b_proj = ColumnParallelLinear(rank, size, bias=False, prefix=f"{prefix}.g_b_proj")
        self.b_proj = ColumnParallelLinear(hidden, mixer.num_heads, bias=False, prefix=f"{prefix}.b_proj")
        self.A_log = sharded_parameter([mixer.num_heads], dtype=torch.float32)
        self.dt_bias = sharded_parameter([size], dtype=torch.float32)
        self.o_norm = GatedRMSNorm(mixer.head_dim, mixer.norm_eps, mixer.gate_activation)
        self.o_proj = RowParallelLinear(
            size, hidden, bias=False, reduce_results=False, prefix=f"{prefix}.o_proj"
        )

    def inputs(self, x_ND: Tensor) -> tuple[Tensor, Tensor]:
        """See `DeltaMixer`."""
        gate = self.g_b_proj(self.g_a_proj(x_ND)[0])[0]
        return self.qkv_proj(x_ND)[0], gate.unflatten(-1, (-1, self.head_dim))

    def split_heads(self, qkv_NC: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """See `DeltaMixer`."""
        q, k, v = (part.unflatten(-1, (-1, self.head_dim)) for part in qkv_NC.chunk(3, dim=-1))
        return q, k, v

    def gates(self, x_ND: Tensor) -> DeltaGates:
        """See `DeltaMixer`."""
        decay = self.f_b_proj(self.f_a_proj(x_ND)[0])[0].unflatten(-1, (-1, self.head_dim))
        return DeltaGates(decay, self.b_proj(x_ND)[0], self.A_log, self.dt_bias)

    @property
    def output_norm(self) -> GatedRMSNorm:
        """See `DeltaMixer`."""
        return self.o_norm

    def project(self, out_NC: Tensor) -> Tensor:
        """See `DeltaMixer`."""
        return self.o_proj(out_NC)[0]

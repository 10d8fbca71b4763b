"""The FFN of a layer, with a gate or without, sharded over its inner channels."""

from __future__ import annotations

from torch import Tensor, nn
from transformers.activations import ACT2FN
from vllm.model_executor.layers.activation import SiluAndMul
from vllm.model_executor.layers.linear import (
    ColumnParallelLinear,
    MergedColumnParallelLinear,
    RowParallelLinear,
)

from gearshift.supernet.feed_forward_config import FeedForwardConfig

# Where the weights of a checkpoint go, as for attention.
MERGED = {"gate_proj": ("gate_up_proj", 0), "up_proj": ("gate_up_proj", 1)}


class GatedFeedForward(nn.Module):
    """down(act(gate x) * up x), gate and up in one product."""

    def __init__(self, config: FeedForwardConfig, prefix: str) -> None:
        super().__init__()
        bias = config.has_bias("gate_proj")
        self.gate_up_proj = MergedColumnParallelLinear(
            config.hidden_size, [config.intermediate_size] * 2, bias=bias, prefix=f"{prefix}.gate_up_proj"
        )
        self.down_proj = RowParallelLinear(
            config.intermediate_size, config.hidden_size, bias=bias, prefix=f"{prefix}.down_proj"
        )
        # vLLM's kernel does both at once for the usual activation; any other one of Transformers' will do.
        self.fused = SiluAndMul() if config.hidden_act in ("silu", "swish") else None
        self.activation = ACT2FN[config.hidden_act]

    def forward(self, x_ND: Tensor) -> Tensor:
        """Each token on its own, (N, D)."""
        inner = self.gate_up_proj(x_ND)[0]
        if self.fused is not None:
            return self.down_proj(self.fused(inner))[0]
        gate, up = inner.chunk(2, dim=-1)
        return self.down_proj(self.activation(gate) * up)[0]


class PlainFeedForward(nn.Module):
    """down(act(up x))."""

    def __init__(self, config: FeedForwardConfig, prefix: str) -> None:
        super().__init__()
        self.up_proj = ColumnParallelLinear(
            config.hidden_size,
            config.intermediate_size,
            bias=config.has_bias("up_proj"),
            prefix=f"{prefix}.up_proj",
        )
        self.down_proj = RowParallelLinear(
            config.intermediate_size,
            config.hidden_size,
            bias=config.has_bias("down_proj"),
            prefix=f"{prefix}.down_proj",
        )
        self.activation = ACT2FN[config.hidden_act]

    def forward(self, x_ND: Tensor) -> Tensor:
        """Each token on its own, (N, D)."""
        return self.down_proj(self.activation(self.up_proj(x_ND)[0]))[0]


def feed_forward(config: FeedForwardConfig, prefix: str) -> nn.Module:
    """The FFN of one layer."""
    return GatedFeedForward(config, prefix) if config.mlp_gated else PlainFeedForward(config, prefix)

"""The FFN without a gate; the gated one is Transformers' own Llama module."""

from __future__ import annotations

from torch import Tensor, nn
from transformers.activations import ACT2FN
from transformers.models.llama.modeling_llama import LlamaMLP

from gearshift.supernet.feed_forward_config import FeedForwardConfig


class UngatedMLP(nn.Module):
    """down(act(up x))."""

    def __init__(self, config: FeedForwardConfig) -> None:
        super().__init__()
        hidden, inner = config.hidden_size, config.intermediate_size
        self.up_proj = nn.Linear(hidden, inner, bias=config.has_bias("up_proj"))
        self.down_proj = nn.Linear(inner, hidden, bias=config.has_bias("down_proj"))
        self.act_fn = ACT2FN[config.hidden_act]

    def forward(self, x_BTD: Tensor) -> Tensor:
        """Each token on its own, (B, T, D)."""
        return self.down_proj(self.act_fn(self.up_proj(x_BTD)))


def feed_forward(config: FeedForwardConfig) -> nn.Module:
    """The FFN of one layer, with a gate or without."""
    if not config.mlp_gated:
        return UngatedMLP(config)
    return LlamaMLP(config)  # pyright: ignore[reportArgumentType] - reads shared field names

"""Kimi Delta Attention (arXiv 2510.26692), with the tensor names of Kimi Linear."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from gearshift.placement import KIMI_DELTA_ATTENTION
from gearshift.supernet.config import KimiDeltaAttentionConfig
from gearshift.supernet.mixers.base import register_mixer
from gearshift.supernet.mixers.gated_delta_net import initialize_decay
from gearshift.supernet.mixers.recurrent import RecurrentMixer, log_decay
from gearshift.supernet.ops.gated_norm import GatedRMSNorm

if TYPE_CHECKING:
    from gearshift.supernet.config import SupernetConfig


@register_mixer(KIMI_DELTA_ATTENTION, short="kda")
class KimiDeltaAttention(RecurrentMixer):
    """A delta rule whose state decays by one number a key channel; decay and output gate have low rank.

    Rows of every projection, and of ``dt_bias``: heads outer, channels inner.
    """

    config_class = KimiDeltaAttentionConfig

    def __init__(self, config: SupernetConfig, mixer_config: KimiDeltaAttentionConfig) -> None:
        super().__init__(config, mixer_config)
        assert config.hidden_size is not None
        c = mixer_config
        self.heads, self.head_dim = c.num_heads, c.head_dim
        hidden, size = config.hidden_size, c.num_heads * c.head_dim
        self.q_proj = nn.Linear(hidden, size, bias=False)
        self.k_proj = nn.Linear(hidden, size, bias=False)
        self.v_proj = nn.Linear(hidden, size, bias=False)
        self.q_conv1d = nn.Conv1d(size, size, c.conv_kernel, groups=size, bias=c.conv_bias)
        self.k_conv1d = nn.Conv1d(size, size, c.conv_kernel, groups=size, bias=c.conv_bias)
        self.v_conv1d = nn.Conv1d(size, size, c.conv_kernel, groups=size, bias=c.conv_bias)
        self.f_a_proj = nn.Linear(hidden, c.gate_rank, bias=False)
        self.f_b_proj = nn.Linear(c.gate_rank, size, bias=False)
        self.b_proj = nn.Linear(hidden, c.num_heads, bias=False)
        self.g_a_proj = nn.Linear(hidden, c.gate_rank, bias=False)
        self.g_b_proj = nn.Linear(c.gate_rank, size, bias=False)
        self.A_log = nn.Parameter(torch.zeros(c.num_heads))
        self.dt_bias = nn.Parameter(torch.zeros(size))
        self.o_norm = GatedRMSNorm(c.head_dim, c.norm_eps, c.gate_activation)
        self.o_proj = nn.Linear(size, hidden, bias=False)

    def initialize(self) -> None:
        """Decay as in Gated DeltaNet, one time step a channel."""
        initialize_decay(self.A_log, self.dt_bias)

    def qkv(self, x_BTD: Tensor) -> Tensor:
        """See :class:`RecurrentMixer`."""
        return torch.cat([self.q_proj(x_BTD), self.k_proj(x_BTD), self.v_proj(x_BTD)], dim=-1)

    def convolution(self) -> tuple[Tensor, Tensor | None]:
        """See :class:`RecurrentMixer`."""
        convolutions = (self.q_conv1d, self.k_conv1d, self.v_conv1d)
        biases = [convolution.bias for convolution in convolutions if convolution.bias is not None]
        weight = torch.cat([convolution.weight for convolution in convolutions]).squeeze(1)
        return weight, torch.cat(biases) if biases else None

    def split_heads(self, qkv_BTC: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """See :class:`RecurrentMixer`."""
        q, k, v = (part.unflatten(-1, (self.heads, self.head_dim)) for part in qkv_BTC.chunk(3, dim=-1))
        return q, k, v

    def decay_and_strength(self, x_BTD: Tensor) -> tuple[Tensor, Tensor]:
        """See :class:`RecurrentMixer`."""
        x = self.f_b_proj(self.f_a_proj(x_BTD)).unflatten(-1, (self.heads, self.head_dim))
        g = log_decay(self.A_log[:, None], x, self.dt_bias.view(self.heads, self.head_dim))
        return g, self.b_proj(x_BTD).float().sigmoid()

    def output(self, out_BTHV: Tensor, x_BTD: Tensor) -> Tensor:
        """See :class:`RecurrentMixer`."""
        gate = self.g_b_proj(self.g_a_proj(x_BTD)).unflatten(-1, (self.heads, self.head_dim))
        return self.o_proj(self.o_norm(out_BTHV, gate).flatten(2))

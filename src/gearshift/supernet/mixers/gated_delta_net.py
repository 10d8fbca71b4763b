"""Gated DeltaNet (arXiv 2412.06464), in the tensor layout of vLLM's flat ``in_proj_qkvz``."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from transformers import initialization as init

from gearshift.placement import GATED_DELTA_NET
from gearshift.supernet.config import GatedDeltaNetConfig
from gearshift.supernet.mixers.base import register_mixer
from gearshift.supernet.mixers.recurrent import RecurrentMixer, log_decay
from gearshift.supernet.ops.gated_norm import GatedRMSNorm

if TYPE_CHECKING:
    from gearshift.supernet.config import SupernetConfig


@register_mixer(GATED_DELTA_NET, short="gdn")
class GatedDeltaNet(RecurrentMixer):
    """A delta rule whose state decays by one number a head.

    Rows of ``in_proj_qkvz``: all of Q, all of K, all of V, all of Z (the output gate), heads outer. Rows of
    ``in_proj_ba``: write strengths b of all heads, then decay inputs a. Channels of ``conv1d``: Q, K, V.
    """

    config_class = GatedDeltaNetConfig

    def __init__(self, config: SupernetConfig, mixer_config: GatedDeltaNetConfig) -> None:
        super().__init__(config, mixer_config)
        assert config.hidden_size is not None
        c = mixer_config
        self.heads = c.num_heads
        self.conv_activation = c.conv_activation
        self.key_dim, self.value_dim = c.key_head_dim, c.value_head_dim
        self.key_size, self.value_size = c.num_key_heads * c.key_head_dim, c.num_heads * c.value_head_dim
        channels = 2 * self.key_size + self.value_size
        self.in_proj_qkvz = nn.Linear(config.hidden_size, channels + self.value_size, bias=False)
        self.in_proj_ba = nn.Linear(config.hidden_size, 2 * c.num_heads, bias=False)
        self.conv1d = nn.Conv1d(channels, channels, c.conv_kernel, groups=channels, bias=c.conv_bias)
        self.A_log = nn.Parameter(torch.zeros(c.num_heads))
        self.dt_bias = nn.Parameter(torch.zeros(c.num_heads))
        self.norm = GatedRMSNorm(c.value_head_dim, c.norm_eps, c.gate_activation)
        self.out_proj = nn.Linear(self.value_size, config.hidden_size, bias=False)

    def initialize(self) -> None:
        """Decay rates from 1 to 16 a head and time steps from 1e-3 to 1e-1, as in the paper's code."""
        initialize_decay(self.A_log, self.dt_bias)

    def qkv(self, x_BTD: Tensor) -> Tensor:
        """See :class:`RecurrentMixer`."""
        return nn.functional.linear(x_BTD, self.in_proj_qkvz.weight[: 2 * self.key_size + self.value_size])

    def convolution(self) -> tuple[Tensor, Tensor | None]:
        """See :class:`RecurrentMixer`."""
        return self.conv1d.weight.squeeze(1), self.conv1d.bias

    def split_heads(self, qkv_BTC: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """See :class:`RecurrentMixer`."""
        q, k, v = qkv_BTC.split([self.key_size, self.key_size, self.value_size], dim=-1)
        return q.unflatten(-1, (-1, self.key_dim)), k.unflatten(-1, (-1, self.key_dim)), self._value_heads(v)

    def decay_and_strength(self, x_BTD: Tensor) -> tuple[Tensor, Tensor]:
        """See :class:`RecurrentMixer`."""
        b, a = self.in_proj_ba(x_BTD).split(self.heads, dim=-1)
        return log_decay(self.A_log, a, self.dt_bias), b.sigmoid()

    def output(self, out_BTHV: Tensor, x_BTD: Tensor) -> Tensor:
        """See :class:`RecurrentMixer`."""
        z = nn.functional.linear(x_BTD, self.in_proj_qkvz.weight[2 * self.key_size + self.value_size :])
        return self.out_proj(self.norm(out_BTHV, self._value_heads(z)).flatten(2))

    def _value_heads(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.heads, self.value_dim))


@torch.no_grad()
def initialize_decay(a_log: Tensor, dt_bias: Tensor) -> None:
    """exp(A_log) uniform in [1, 16], softplus(dt_bias) log-uniform in [1e-3, 0.1]; not what was loaded."""
    init.copy_(a_log, torch.empty_like(a_log).uniform_(1, 16).log())
    step = torch.empty_like(dt_bias).uniform_(math.log(1e-3), math.log(1e-1)).exp()
    init.copy_(dt_bias, step + torch.log(-torch.expm1(-step)))  # inverse of softplus

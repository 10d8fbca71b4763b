"""RMS normalisation of each head followed by an output gate."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

GATE_ACTIVATIONS = {"silu": functional.silu, "sigmoid": torch.sigmoid}


class GatedRMSNorm(nn.Module):
    """o / sqrt(mean(o^2) + eps) * weight * activation(gate), the mean over one head, in float32.

    Args:
        head_dim: channels of a head; one weight vector serves all heads.
        eps: added to the mean square.
        activation: ``silu`` (Gated DeltaNet, Super Apriel) or ``sigmoid`` (Kimi Linear).
    """

    def __init__(self, head_dim: int, eps: float, activation: str) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(head_dim))
        self.eps, self.activation_name = eps, activation
        self.activation = GATE_ACTIVATIONS[activation]

    def forward(self, o_BTHV: Tensor, gate_BTHV: Tensor) -> Tensor:
        """Normalise and gate; the result has o's dtype."""
        o = o_BTHV.float()
        o = o * torch.rsqrt(o.square().mean(-1, keepdim=True) + self.eps)
        return (o * self.weight.float() * self.activation(gate_BTHV.float())).to(o_BTHV.dtype)

"""How far back the heads of an attention look.

Shape letters: B batch, T tokens, Q queries looked at, H query heads, G key/value heads, K head size.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from gearshift.supernet import SequenceContext
from gearshift.supernet.mixers.full_attention import FullAttention

# Attention rests on the first tokens of a text when it has nothing to look for: that says nothing of how long
# a memory has to last.
RESTING_TOKENS = 4
# Queries of a window that are looked at, all in its second half, where there is a past to choose from.
MOST_QUERIES = 128


class AttentionDistances:
    """Adds up, for each head, how much attention falls on the token ``d`` places back.

    Attributes:
        mass_HT: the sum for each head and distance, float64; None before the first batch.
    """

    def __init__(self) -> None:
        self.mass_HT: Tensor | None = None

    def add(self, attention: FullAttention, x_BTD: Tensor, context: SequenceContext) -> None:
        """Look at one batch of plain sequences: the layer's normed input."""
        tokens = x_BTD.shape[1]
        queries_Q = torch.linspace(tokens // 2, tokens - 1, min(MOST_QUERIES, tokens - tokens // 2)).long()
        queries_Q = queries_Q.to(x_BTD.device)
        distance_QT = queries_Q[:, None] - torch.arange(tokens, device=x_BTD.device)
        seen_QT = (distance_QT >= 0) & (distance_QT < (attention.window or tokens))
        weights_HQT = _attention(attention, x_BTD, context, queries_Q, seen_QT).sum(0)
        weights_HQT[..., :RESTING_TOKENS] = 0
        mass_HT = weights_HQT.new_zeros(weights_HQT.shape[0], tokens, dtype=torch.float64)
        mass_HT.index_add_(1, distance_QT.clamp_min(0).flatten(), weights_HQT.double().flatten(1))
        self.mass_HT = mass_HT.cpu() if self.mass_HT is None else self.mass_HT + mass_HT.cpu()

    def time_scales(self) -> Tensor:
        """For each head the tokens after which a memory shall have faded to 1/e, (H).

        A memory that halves with every median distance has as much of its weight within that distance as the
        head has of its attention.
        """
        assert self.mass_HT is not None, "no batch was looked at"
        within_HT = self.mass_HT.cumsum(1)
        median_H = (within_HT < within_HT[:, -1:] / 2).sum(1) + 1
        return median_H / math.log(2)


def _attention(
    attention: FullAttention, x_BTD: Tensor, context: SequenceContext, queries_Q: Tensor, seen_QT: Tensor
) -> Tensor:
    """The attention weights of some queries, (B, H, Q, T), float32."""
    q_BHTK, k_BGTK = attention.queries_and_keys(x_BTD, context)
    q_BHQK = q_BHTK[:, :, queries_Q].float()
    k_BHTK = k_BGTK.float().repeat_interleave(q_BHTK.shape[1] // k_BGTK.shape[1], dim=1)
    scores = q_BHQK @ k_BHTK.transpose(-1, -2) * q_BHTK.shape[-1] ** -0.5
    return scores.masked_fill(~seen_QT, float("-inf")).softmax(-1)

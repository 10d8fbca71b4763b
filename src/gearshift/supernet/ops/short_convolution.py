"""The short causal depthwise convolution in front of the delta rules, with its state for decoding."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional

CONV_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {"silu": functional.silu, "none": lambda x: x}


def short_convolution(
    x_BTC: Tensor,
    weight_CK: Tensor,
    state_BCK: Tensor | None,
    lengths_B: Tensor | None = None,
    bias_C: Tensor | None = None,
    activation: str = "silu",
) -> tuple[Tensor, Tensor]:
    """A causal depthwise convolution over K taps and its activation; tap K-1 meets the current token.

    Args:
        x_BTC: inputs; rows may be padded on the right.
        weight_CK: one filter of K taps for each channel.
        state_BCK: the K-1 inputs before the first token, shape (B, K-1, C); None for zeros.
        lengths_B: how many tokens of each row count; None when all do.
        bias_C: added to each channel before the activation; the state holds inputs, which have none of it.
        activation: ``silu`` or ``none``.

    Returns:
        Outputs (B, T, C) in x's dtype, and the last K-1 inputs that count, shape (B, K-1, C).
    """
    taps = weight_CK.shape[1]
    tokens = x_BTC.shape[1]
    if state_BCK is None:
        history = functional.pad(x_BTC, (0, 0, taps - 1, 0))
    else:
        history = torch.cat([state_BCK.to(x_BTC.dtype), x_BTC], dim=1)
    # K shifted products: for K = 4 faster on a CPU than a depthwise convolution, and exact in any layout.
    out = history[:, :tokens] * weight_CK[:, 0]
    for tap in range(1, taps):
        out = torch.addcmul(out, history[:, tap : tap + tokens], weight_CK[:, tap])
    if bias_C is not None:
        out = out + bias_C
    # Under autocast x is in bfloat16 and the filters in float32; the kernels behind want what x is.
    return CONV_ACTIVATIONS[activation](out).to(x_BTC.dtype), _last_inputs(history, taps - 1, lengths_B)


def _last_inputs(history: Tensor, count: int, lengths_B: Tensor | None) -> Tensor:
    if lengths_B is None:
        return history[:, history.shape[1] - count :]
    # Row b's next window starts right after its own last token, not after its padding.
    index = lengths_B[:, None] + torch.arange(count, device=history.device)
    return history.gather(1, index[..., None].expand(-1, -1, history.shape[2]))

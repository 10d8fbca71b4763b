"""Decay rates of the delta rules from how far back the teacher's heads look."""

from __future__ import annotations

import torch
from torch import Tensor

from gearshift.supernet.mixers import Mixer


@torch.no_grad()
def set_time_scales(mixer: Mixer, scales_H: Tensor) -> bool:
    """Let every head's memory fade to 1/e within so many tokens, where inputs say nothing else.

    It fits mixers that decay by ``exp(-exp(A_log) softplus(... + dt_bias))`` with ``A_log`` of one number a
    head and ``dt_bias`` of one or several.

    Returns:
        Whether the mixer is one of those and has as many heads.
    """
    a_log, dt_bias = getattr(mixer, "A_log", None), getattr(mixer, "dt_bias", None)
    if not isinstance(a_log, Tensor) or not isinstance(dt_bias, Tensor):
        return False
    if a_log.shape != scales_H.shape or dt_bias.numel() % a_log.numel():
        return False
    rates_H = 1 / (scales_H.to(a_log) * a_log.exp())
    bias_H = rates_H + torch.log(-torch.expm1(-rates_H))  # inverse of softplus
    dt_bias.copy_(bias_H.repeat_interleave(dt_bias.numel() // len(bias_H)).view_as(dt_bias))
    return True

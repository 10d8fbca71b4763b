"""Sliding-window attention: full attention that sees only the last ``window`` tokens."""

from __future__ import annotations

from gearshift.placement import SLIDING_ATTENTION
from gearshift.supernet.config import SlidingAttentionConfig
from gearshift.supernet.mixers.base import register_mixer
from gearshift.supernet.mixers.full_attention import FullAttention


@register_mixer(SLIDING_ATTENTION, short="swa")
class SlidingAttention(FullAttention):
    """A token sees itself and the ``window - 1`` before it."""

    config_class = SlidingAttentionConfig

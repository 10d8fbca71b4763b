"""The mixers, one file each. A new one is a file here and a name in this list."""

from gearshift.supernet.mixers import full_attention, gated_delta_net, kimi_delta_attention, sliding_attention
from gearshift.supernet.mixers.base import MIXER_CLASSES, Mixer, register_mixer

__all__ = [
    "MIXER_CLASSES",
    "Mixer",
    "full_attention",
    "gated_delta_net",
    "kimi_delta_attention",
    "register_mixer",
    "sliding_attention",
]

"""One colour per mixer, told apart with every kind of colour blindness.

From Okabe and Ito, "Color Universal Design" (2008): blues for attention, warm colours for the delta rules.
"""

from __future__ import annotations

from gearshift.placement import (
    FULL_ATTENTION,
    GATED_DELTA_NET,
    KIMI_DELTA_ATTENTION,
    SLIDING_ATTENTION,
    known_mixers,
)

BLACK = "#000000"
GREY = "#8a8a8a"
PURPLE = "#CC79A7"

_COLOURS = {
    FULL_ATTENTION: "#0072B2",
    SLIDING_ATTENTION: "#56B4E9",
    GATED_DELTA_NET: "#E69F00",
    KIMI_DELTA_ATTENTION: "#D55E00",
}
_FURTHER = ("#009E73", "#F0E442")
_DARK = ("#0072B2", "#D55E00", "#009E73")


def mixer_colour(mixer: str) -> str:
    """Colour of a mixer's long name; mixers beyond the four take the further colours in turn."""
    if mixer in _COLOURS:
        return _COLOURS[mixer]
    return _FURTHER[(known_mixers().index(mixer) - len(_COLOURS)) % len(_FURTHER)]


def text_colour(mixer: str) -> str:
    """Black or white, whichever is legible on the mixer's colour."""
    return "#ffffff" if mixer_colour(mixer) in _DARK else BLACK

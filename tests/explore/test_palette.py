"""Colours: told apart with colour blindness, text on them legible, further mixers served."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from gearshift import placement
from gearshift.explore.palette import mixer_colour, text_colour
from gearshift.placement import MIXERS, register_mixer_name

# Linear-light simulation of dichromats by Vienot, Brettel and Mollon (1999).
DICHROMATS = {
    "none": np.eye(3),
    "protanopia": [[0.11238, 0.88762, 0.0], [0.11238, 0.88762, 0.0], [0.00401, -0.00401, 1.0]],
    "deuteranopia": [[0.29275, 0.70725, 0.0], [0.29275, 0.70725, 0.0], [-0.02234, 0.02234, 1.0]],
}


def _linear(colour: str) -> np.ndarray:
    channels = np.array([int(colour[start : start + 2], 16) for start in (1, 3, 5)]) / 255
    return np.where(channels <= 0.04045, channels / 12.92, ((channels + 0.055) / 1.055) ** 2.4)


def _lab(linear: np.ndarray) -> np.ndarray:
    to_xyz = np.array([[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]])
    x, y, z = np.cbrt(np.clip(to_xyz @ linear, 1e-6, None) / [0.9505, 1.0, 1.089])
    return np.array([116 * y - 16, 500 * (x - y), 200 * (y - z)])


@pytest.mark.parametrize("sight", DICHROMATS)
def test_mixers_differ_for_every_sight(sight):
    seen = [_lab(np.array(DICHROMATS[sight]) @ _linear(mixer_colour(mixer))) for mixer in MIXERS]
    assert min(np.linalg.norm(left - right) for left, right in itertools.combinations(seen, 2)) > 15


@pytest.mark.parametrize("mixer", MIXERS)
def test_text_is_legible_on_its_mixer(mixer):
    """Contrast as the web accessibility guidelines define it; 3 is their bar for large bold text."""
    weights = [0.2126, 0.7152, 0.0722]
    ground, text = (weights @ _linear(colour) for colour in (mixer_colour(mixer), text_colour(mixer)))
    lighter, darker = max(ground, text), min(ground, text)
    assert (lighter + 0.05) / (darker + 0.05) > 3


def test_further_mixers_have_colours_of_their_own(monkeypatch):
    monkeypatch.setattr(placement, "_short_names", dict(placement._short_names))
    register_mixer_name("fifth_mixer", "m5")
    register_mixer_name("sixth_mixer", "m6")
    assert len({mixer_colour(mixer) for mixer in (*MIXERS, "fifth_mixer", "sixth_mixer")}) == 6

"""The PNG: its size, its colours, and that it replaces the old one in one step."""

from __future__ import annotations

import numpy as np
from matplotlib.image import imread

from gearshift.explore import write_frontier_png
from gearshift.explore.palette import mixer_colour


def _pixels(path) -> np.ndarray:
    return np.rint(imread(path)[..., :3] * 255).astype(int)


def _count(pixels: np.ndarray, colour: str) -> int:
    wanted = [int(colour[start : start + 2], 16) for start in (1, 3, 5)]
    return int((np.abs(pixels - wanted).max(axis=-1) <= 1).sum())


def test_shows_each_mixer_as_often_as_the_presets_use_it(scene, tmp_path):
    path = write_frontier_png(tmp_path / "frontier.png", scene.frontier, scene.presets)
    pixels = _pixels(path)
    assert pixels.shape[1] == 1600
    assert pixels.shape[0] > 1000
    used = {}
    for preset in scene.presets:
        for mixer, count in preset.placement.counts().items():
            used[mixer] = used.get(mixer, 0) + count
    area = {mixer: _count(pixels, mixer_colour(mixer)) for mixer in used}
    most, least = max(used, key=used.__getitem__), min(used, key=used.__getitem__)
    assert area[most] > area[least] > 1000


def test_replaces_the_old_picture_and_leaves_nothing_else(scene, tmp_path):
    path = tmp_path / "frontier.png"
    path.write_bytes(b"old")
    write_frontier_png(path, scene.frontier, scene.presets[:1], title="The teacher alone")
    assert path.read_bytes().startswith(b"\x89PNG")
    assert list(tmp_path.iterdir()) == [path]

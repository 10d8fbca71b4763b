"""``gearshift explore``: a page of what a search wrote, and what is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from typer.testing import Result

from gearshift.files import write_json
from gearshift.presets import Preset, write_presets
from gearshift.search import save_costs, save_surrogate
from tests.explore.conftest import Scene, make_scene
from tests.explore.test_effects import stability

Gearshift = Callable[..., Result]


@pytest.fixture(scope="module")
def scene() -> Scene:
    return make_scene()


@pytest.fixture
def folder(scene: Scene, tmp_path: Path) -> Path:
    save_surrogate(scene.frontier.surrogate, tmp_path / "surrogate.json")
    save_costs([scene.frontier.cost], tmp_path / "costs.json")
    return tmp_path


def test_a_page_with_a_slider_and_a_picture(gearshift: Gearshift, folder: Path):
    write_json(folder / "stability.json", {"format": "gearshift-stability-1", **stability()})
    result = gearshift("explore", folder, "--png", folder / "page.png")
    assert result.exit_code == 0, result.stderr
    assert f"the page written to {folder / 'explore.html'}" in result.stdout
    content = (folder / "explore.html").read_text()
    assert "Rankings over training" in content
    assert '"label":"256"' in content and '"label":"2,048"' in content
    assert "context 2,048, batch 1" in content
    assert (folder / "page.png").read_bytes().startswith(b"\x89PNG")


def test_contexts_and_presets_can_be_chosen(gearshift: Gearshift, folder: Path, scene: Scene):
    write_presets(folder, [Preset("mine", scene.frontier.points[1].placement)])
    contexts = ("--context", 300, "--context", 1000, "--context", 5000)
    result = gearshift("explore", folder, *contexts, "--out", folder / "p.html")
    assert result.exit_code == 0, result.stderr
    content = (folder / "p.html").read_text()
    assert all(f'"label":"{label}"' in content for label in ("300", "1,000", "5,000"))
    assert "<b>mine</b>" in json.loads(json.dumps(content))


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--stability", "nowhere.json"], "nowhere.json is missing"),
        (["--batch", "3"], "do not settle the cost of every mixer"),
        (["--memory", "1"], "do not say how the engine keeps caches"),
    ],
)
def test_wrong_options_are_refused(options: list[str], said: str, gearshift: Gearshift, folder: Path):
    result = gearshift("explore", folder, *options)
    assert result.exit_code == 1
    assert said in result.stderr
    assert not (folder / "explore.html").exists()


def test_a_folder_of_no_search_is_refused(gearshift: Gearshift, tmp_path: Path):
    result = gearshift("explore", tmp_path)
    assert result.exit_code == 1
    assert f"{tmp_path} has no surrogate.json; give a folder that gearshift search wrote" in result.stderr

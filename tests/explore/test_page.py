"""The HTML page: self-contained, complete, safe against odd text, honest about a bad fit."""

from __future__ import annotations

import re
from html.parser import HTMLParser
from pathlib import Path

import pytest

import gearshift.explore as explore
from gearshift.explore import MissingExtraError, write_frontier_page
from gearshift.explore.figures import cost_figure, frontier_figure, quality_figure
from gearshift.explore.page import _layer_row
from gearshift.placement import Placement


class _Reader(HTMLParser):
    """Collects what the page loads, its text outside of scripts, and tags that are left open."""

    def __init__(self) -> None:
        super().__init__()
        self.loads: list[str] = []
        self.text: list[str] = []
        self.open: list[str] = []
        self.cells = 0

    def handle_starttag(self, tag, attrs):
        attributes = dict(attrs)
        self.loads += [value for name, value in attrs if name in ("src", "href") and value]
        self.cells += tag == "b" and "layer " in (attributes.get("title") or "")
        if tag not in ("meta", "link", "br", "img"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] not in ("script", "style"):
            self.text.append(data)


def _read(path) -> _Reader:
    reader = _Reader()
    reader.feed(path.read_text(encoding="utf-8"))
    reader.close()
    return reader


def _traces(figure) -> dict[str, dict]:
    return {trace["name"]: trace for trace in figure.to_dict()["data"]}


@pytest.fixture(scope="module")
def page(scene, tmp_path_factory):
    return write_frontier_page(
        tmp_path_factory.mktemp("page") / "frontier.html",
        scene.frontier,
        scene.presets,
        held_out=scene.held_out,
        other_costs=[scene.other_cost],
        title="Small <script>alert(1)</script> & fine",
        provenance={"commit": "abc123", "hardware": "<b>a processor</b>"},
    )


def test_nothing_is_loaded_from_elsewhere(page):
    content = page.read_text(encoding="utf-8")
    assert _read(page).loads == []
    assert "@import" not in content.partition("<script>")[0]
    assert "Plotly.newPlot" in content
    assert content.count("cdn.plot.ly") == content.count(
        "cdn.plot.ly/un/"
    )  # map data that plotly.js could ask for


def test_every_tag_is_closed_and_phones_are_served(page):
    assert _read(page).open == []
    assert 'name="viewport" content="width=device-width' in page.read_text(encoding="utf-8")


def test_text_is_complete_and_escaped(page, scene):
    text = " ".join(" ".join(_read(page).text).split())
    assert "Small <script>alert(1)</script> & fine" in text
    assert "commit abc123 · hardware <b>a processor</b>" in text
    assert str(scene.frontier.surrogate.report.cross_validated) in text
    assert "relative error on 4 measurements" in text
    assert "Do not trust" not in text


def test_every_preset_has_a_row_of_cells_and_of_numbers(page, scene):
    assert _read(page).cells == 6 * len(scene.presets)
    table = page.read_text(encoding="utf-8").partition("<table>")[2].partition("</table>")[0]
    costs = (scene.frontier.cost, scene.other_cost)
    rows = [re.sub("<[^>]*>", " ", row).split() for row in table.split("<tr>")[3:]]
    assert [row[0] for row in rows] == [preset.name for preset in scene.presets]
    assert rows[0][1:3] == ["fa", "6"]
    predicted = [f"{cost.speed_up(scene.presets[1].placement):.2f}×" for cost in costs]
    assert rows[1][-5:] == ["87.5%", predicted[0], "1.88×", predicted[1], "–"]


def test_a_bad_fit_is_announced_on_top(bad_scene, tmp_path):
    path = write_frontier_page(tmp_path / "bad.html", bad_scene.frontier, bad_scene.presets)
    text = " ".join(_read(path).text)
    assert text.index("Do not trust this frontier yet") < text.index("The presets, layer by layer")
    assert "is below 0.8" in text


def test_figures_hold_every_point(scene):
    frontier = _traces(frontier_figure(scene.frontier, scene.presets, scene.held_out))
    assert {name: len(trace["x"]) for name, trace in frontier.items()} == {
        "90% interval": 2 * len(scene.frontier.points),
        "evaluated": 45,
        "evaluated, held out": len(scene.held_out),
        "frontier, predicted": len(scene.frontier.points),
        "preset": len(scene.presets),
    }
    quality = _traces(quality_figure(scene.frontier.surrogate, None))
    assert list(quality) == ["fitted", "equal"]
    assert list(quality["fitted"]["x"]) == scene.frontier.surrogate.table.values.tolist()
    speed = _traces(cost_figure([scene.frontier.cost, scene.other_cost]))
    assert list(speed) == ["context 2,048, batch 1", "context 256, batch 1", "equal"]
    for trace in speed.values():
        assert list(trace["y"]) == pytest.approx(list(trace["x"]))


def test_layers_too_many_for_names_get_cells_without():
    assert ">fa</b>" in _layer_row("x", Placement.uniform("fa", 16))
    assert ">fa</b>" not in _layer_row("x", Placement.uniform("fa", 17))


def test_an_interrupted_write_leaves_the_old_page(scene, tmp_path, monkeypatch):
    path = tmp_path / "frontier.html"
    path.write_text("old", encoding="utf-8")

    def interrupted(self, text, encoding):
        self.write_bytes(text[:1000].encode(encoding))
        raise KeyboardInterrupt

    monkeypatch.setattr(Path, "write_text", interrupted)
    with pytest.raises(KeyboardInterrupt):
        write_frontier_page(path, scene.frontier, scene.presets)
    assert path.read_text(encoding="utf-8") == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_without_the_libraries_the_extra_is_named(monkeypatch):
    def missing(name):
        raise ModuleNotFoundError("No module named 'plotly'", name="plotly")

    monkeypatch.setattr(explore, "import_module", missing)
    with pytest.raises(MissingExtraError, match=r"need plotly.*pip install 'gearshift\[viz\]'"):
        explore.__getattr__("write_frontier_page")
    with pytest.raises(AttributeError, match="has no attribute 'write_frontier_gif'"):
        explore.__getattr__("write_frontier_gif")

"""The page in a real browser: it draws, its slider moves the points, and a touched point shows its layers."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from html import unescape
from pathlib import Path
from typing import Any

import pytest

from gearshift.explore import write_frontier_page
from gearshift.explore.palette import mixer_colour
from gearshift.placement import Placement
from gearshift.search import CostModel, build_frontier
from gearshift.workload import Workload
from tests.explore.test_effects import stability

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = pytest.mark.skipif(BROWSER is None, reason="no Chromium here; install the package chromium")

# Put at the end of the page: what it says stands in the document that the browser gives back.
PROBE = """
<script>
const said = {errors: []};
window.addEventListener("error", (event) => said.errors.push(event.message));
window.addEventListener("load", async () => {
  const plot = document.getElementById("frontier-plot");
  const names = () => plot.layout.annotations.map((one) => one.x);
  said.plots = document.querySelectorAll(".js-plotly-plot .main-svg").length;
  said.before = names();
  const step = plot.layout.sliders[0].steps[0];
  await Plotly.update(plot, ...step.args);
  said.after = names();
  said.title = plot.layout.xaxis.title.text;
  const trace = plot.data.find((one) => one.name === "frontier, predicted");
  said.x = Array.from(trace.x);
  plot.emit("plotly_click", {points: [{customdata: trace.customdata[1]}]});
  said.cells = [...document.querySelectorAll("#touched b")].map((one) => [one.textContent, one.title]);
  said.colours = [...document.querySelectorAll("#touched b")].map((one) => one.style.background);
  said.buttons = plot.querySelectorAll(".modebar-btn").length;
  said.png = (await Plotly.toImage(plot, {format: "png", width: 400, height: 300})).slice(0, 22);
  said.wide = document.documentElement.scrollWidth <= window.innerWidth;
  const told = document.createElement("output");
  told.id = "said";
  told.textContent = JSON.stringify(said);
  document.body.append(told);
});
</script>
"""


@pytest.fixture(scope="module")
def page(scene, tmp_path_factory) -> Path:
    fit = scene.frontier.cost.fit
    other = build_frontier(scene.frontier.surrogate, CostModel.of(fit, Workload(512, concurrency=1)))
    return write_frontier_page(
        tmp_path_factory.mktemp("page") / "page.html",
        scene.frontier,
        scene.presets,
        held_out=scene.held_out,
        other_contexts=[other],
        stability=stability(),
    )


def in_browser(page: Path, width: int) -> dict[str, Any]:
    """What the probe says of the page."""
    probed = page.with_name("probed.html")
    probed.write_text(
        page.read_text(encoding="utf-8").replace("</body>", f"{PROBE}</body>"), encoding="utf-8"
    )
    options = [
        "--headless=new",
        "--no-sandbox",
        "--disable-gpu",
        "--hide-scrollbars",
        f"--window-size={width},900",
    ]
    profile = f"--user-data-dir={page.parent / 'profile'}"
    command = [str(BROWSER), *options, profile, "--virtual-time-budget=20000", "--dump-dom", probed.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    found = re.search(r'<output id="said">(.*?)</output>', done.stdout, re.DOTALL)
    assert found, done.stderr[-2000:]
    return json.loads(unescape(found[1]))


@pytest.mark.parametrize("width", [1200, 500])
def test_the_page_works(page, scene, width):
    said = in_browser(page, width)
    assert said["errors"] == []
    assert said["plots"] >= 7
    assert said["wide"], "the page is wider than the screen"
    assert said["before"] != said["after"] and said["title"] == "speed-up (context 512, batch 1)"
    assert said["png"] == "data:image/png;base64,"
    assert said["buttons"] == 1
    fit = scene.frontier.cost.fit
    other = build_frontier(scene.frontier.surrogate, CostModel.of(fit, Workload(512, concurrency=1)))
    assert said["x"] == pytest.approx([point.speed_up for point in other.points])
    placement: Placement = other.points[1].placement
    assert [title for _, title in said["cells"]] == [
        f"layer {layer}: {mixer}" for layer, mixer in enumerate(placement)
    ]
    rgb = [tuple(int(mixer_colour(m)[i : i + 2], 16) for i in (1, 3, 5)) for m in placement]
    assert said["colours"] == [f"rgb({r}, {g}, {b})" for r, g, b in rgb]

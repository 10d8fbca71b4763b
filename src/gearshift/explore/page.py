"""The frontier as one HTML file that needs no network."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from html import escape
from importlib.resources import files
from pathlib import Path
from string import Template
from typing import Any

import plotly.graph_objects as go
from plotly.offline import get_plotlyjs

from gearshift.explore.diagnostics import importance_figure, interaction_figure, stability_figures
from gearshift.explore.figures import cost_figure, frontier_figure, quality_figure
from gearshift.explore.palette import mixer_colour, text_colour
from gearshift.explore.series import describe_workload, measurement_for, summary
from gearshift.files import atomic_file
from gearshift.placement import Placement, short_name
from gearshift.presets import Preset
from gearshift.search.cost import CostModel
from gearshift.search.frontier import Frontier
from gearshift.search.report import FitReport
from gearshift.search.table import EvaluationTable

# Cells of more layers than this are too narrow for the mixer's name.
_NAMED_CELLS = 16


def write_frontier_page(
    path: Path,
    frontier: Frontier,
    presets: Sequence[Preset],
    *,
    held_out: EvaluationTable | None = None,
    other_costs: Sequence[CostModel] = (),
    other_contexts: Sequence[Frontier] = (),
    stability: Mapping[str, Any] | None = None,
    title: str = "One checkpoint, many speeds",
    provenance: Mapping[str, str] | None = None,
) -> Path:
    """Write the page: frontier, presets, layers and what they cost, and how well the predictions fit.

    Args:
        path: the ``.html`` file, replaced in one step.
        frontier: what to show.
        presets: at least one; measured speed and retention are shown where a preset has them.
        held_out: evaluated placements that the surrogate was not fitted to.
        other_costs: cost models of further workloads, for the table and the diagnostics.
        other_contexts: frontiers at further context lengths, for a slider.
        stability: what `gearshift stability` wrote, if anything.
        title: heading of the page.
        provenance: where the numbers come from, as `gearshift.provenance.provenance` gives it.
    """
    costs = [frontier.cost, *other_costs]
    template = Template(files("gearshift.explore").joinpath("page.html").read_text(encoding="utf-8"))
    page = template.substitute(
        title=escape(title),
        summary=escape(summary(frontier, presets)),
        provenance=_provenance_line(provenance or {}),
        plotly=get_plotlyjs(),
        warnings=_warnings(frontier.surrogate.report),
        frontier=_embedded(frontier_figure(frontier, presets, held_out, other_contexts), "frontier-plot"),
        looks=_looks(frontier.surrogate.table.space.mixers),
        importance=_embedded(importance_figure(frontier.surrogate)),
        interactions=_embedded(interaction_figure(frontier.surrogate)),
        stability=_stability(stability),
        legend=_legend(frontier.surrogate.table.space.mixers),
        layers="\n".join(_layer_row(preset.name, preset.placement) for preset in presets),
        table=_preset_table(frontier, presets, costs),
        quality=_embedded(quality_figure(frontier.surrogate, held_out)),
        report=escape(str(frontier.surrogate.report)),
        cost=_embedded(cost_figure(costs)),
        costs=escape("\n".join(map(str, costs))),
    )
    with atomic_file(Path(path)) as partial:
        partial.write_text(page, encoding="utf-8")
    return Path(path)


def _embedded(figure: go.Figure, div_id: str | None = None) -> str:
    """A figure with one button, which saves it as a PNG."""
    config = {
        "displayModeBar": True,
        "displaylogo": False,
        "responsive": True,
        "modeBarButtons": [["toImage"]],
        "toImageButtonOptions": {"format": "png", "scale": 2, "filename": div_id or "gearshift"},
    }
    return figure.to_html(full_html=False, include_plotlyjs=False, config=config, div_id=div_id)


def _looks(mixers: Sequence[str]) -> str:
    """Name and colours of each mixer by its short name, for the script that draws a touched placement."""
    looks = {
        short_name(mixer): {"name": mixer, "ground": mixer_colour(mixer), "text": text_colour(mixer)}
        for mixer in mixers
    }
    return json.dumps(looks)


def _stability(stability: Mapping[str, Any] | None) -> str:
    """A section of its own, or nothing."""
    if stability is None:
        return ""
    correlation, regret = (f"<div>{_embedded(figure)}</div>" for figure in stability_figures(stability))
    return (
        "<section><h2>Rankings over training</h2><p>Each checkpoint against the last one, with 90% intervals "
        "over placements. Regret is what is lost at the end by choosing early.</p>"
        f'<div class="pair">{correlation}{regret}</div></section>'
    )


def _provenance_line(provenance: Mapping[str, str]) -> str:
    return " · ".join(f"{escape(key)} {escape(str(value))}" for key, value in provenance.items())


def _warnings(report: FitReport) -> str:
    lines = "".join(f"<li>{escape(warning)}</li>" for warning in report.warnings)
    return (
        f'<div class="warning"><b>Do not trust this frontier yet.</b><ul>{lines}</ul></div>' if lines else ""
    )


def _legend(mixers: Sequence[str]) -> str:
    return "".join(
        f'<span><i style="background:{mixer_colour(mixer)}"></i><b>{short_name(mixer)}</b> '
        f"{mixer.replace('_', ' ')}</span>"
        for mixer in mixers
    )


def _layer_row(name: str, placement: Placement) -> str:
    """A preset's name and a coloured cell for each of its layers, with the mixer's name if it fits."""
    named = len(placement) <= _NAMED_CELLS
    cells = "".join(
        f'<b style="background:{mixer_colour(mixer)};color:{text_colour(mixer)}" '
        f'title="layer {layer}: {mixer}">{short_name(mixer) if named else ""}</b>'
        for layer, mixer in enumerate(placement)
    )
    return f'<div class="row"><span>{escape(name)}</span><div class="cells">{cells}</div></div>'


def _preset_table(frontier: Frontier, presets: Sequence[Preset], costs: Sequence[CostModel]) -> str:
    """Layers per mixer, retention and speed-ups, each as predicted and, where it was, as measured."""
    groups = ["retention", *(f"speed-up at {describe_workload(cost)}" for cost in costs)]
    wide = "".join(f'<th colspan="2">{escape(group)}</th>' for group in groups)
    narrow = _cells("th", ["predicted", "measured"] * len(groups))
    head = f'<tr><th rowspan="2">preset</th><th rowspan="2">layers</th>{wide}</tr>\n<tr>{narrow}</tr>'
    points = frontier.predict([preset.placement for preset in presets])
    rows = []
    for preset, point in zip(presets, points, strict=True):
        cells = _preset_cells(preset, costs)
        kept = "–" if preset.retention is None else f"{preset.retention:.1%}"
        rows.append(f"<tr>{_cells('td', [*cells[:2], f'{point.retention:.1%}', kept, *cells[2:]])}</tr>")
    return f"<thead>{head}</thead>\n<tbody>" + "\n".join(rows) + "</tbody>"


def _preset_cells(preset: Preset, costs: Sequence[CostModel]) -> list[str]:
    """Name, layers per mixer, and for each workload the predicted and the measured speed-up."""
    counts = preset.placement.counts().items()
    layers = " ".join(f"<span>{short_name(mixer)} {count}</span>" for mixer, count in counts)
    cells = [f"<b>{escape(preset.name)}</b>", layers]
    for cost in costs:
        measured = measurement_for(preset, cost)
        cells += [f"{cost.speed_up(preset.placement):.2f}×", f"{measured.speed_up:.2f}×" if measured else "–"]
    return cells


def _cells(tag: str, contents: Sequence[str]) -> str:
    return "".join(f"<{tag}>{content}</{tag}>" for content in contents)

"""The page's plotly figures."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import plotly.graph_objects as go

from gearshift.explore.palette import BLACK, GREY, PURPLE
from gearshift.explore.series import (
    Dot,
    describe_workload,
    evaluated_dots,
    frontier_dots,
    preset_dots,
)
from gearshift.placement import Placement
from gearshift.presets import Preset
from gearshift.search.cost import CostModel
from gearshift.search.frontier import Frontier
from gearshift.search.surrogate import Surrogate
from gearshift.search.table import EvaluationTable

_GRID = "#e6e6e6"
_HOVER = "%{customdata[0]}<extra></extra>"
_LOOKS = (("circle-open", GREY), ("diamond", PURPLE), ("square-open", BLACK), ("triangle-up", GREY))
# A preset's name stands above and to the right of it, legible where the frontier passes behind it.
_NAME = {
    "showarrow": False,
    "xanchor": "left",
    "xshift": 8,
    "yshift": 15,
    "borderpad": 1,
    "bgcolor": "rgba(255, 255, 255, 0.7)",
}


@dataclass(frozen=True)
class _Pairs:
    """What was found and what was predicted for some placements."""

    placements: Sequence[Placement]
    found: Sequence[float]
    predicted: Sequence[float]


def frontier_figure(
    frontier: Frontier,
    presets: Sequence[Preset],
    held_out: EvaluationTable | None,
    other_contexts: Sequence[Frontier] = (),
) -> go.Figure:
    """Retention against speed-up: evaluated placements, the frontier with its intervals, the presets.

    With frontiers of other contexts there is a slider that chooses among all of them.
    """
    figure = go.Figure(_traces(frontier, presets, held_out))
    style(figure, _across(frontier), "retention", 460)
    figure.update_layout(
        margin_r=60,
        xaxis_ticksuffix="×",
        yaxis_tickformat=".0%",
        annotations=_names(preset_dots(frontier, presets)),
    )
    if other_contexts:
        every = sorted([frontier, *other_contexts], key=lambda one: one.cost.context_length)
        figure.update_layout(sliders=[_slider(every, every.index(frontier), presets, held_out)], height=540)
    return figure


def _across(frontier: Frontier) -> str:
    return f"speed-up ({describe_workload(frontier.cost)})"


def _traces(
    frontier: Frontier, presets: Sequence[Preset], held_out: EvaluationTable | None
) -> list[go.Scatter]:
    line = frontier_dots(frontier)
    traces = [
        _band(line),
        _dots("evaluated", evaluated_dots(frontier, frontier.surrogate.table), "circle-open", GREY, 7),
    ]
    if held_out is not None:
        traces.append(
            _dots("evaluated, held out", evaluated_dots(frontier, held_out), "x-thin-open", GREY, 7)
        )
    on_line = _dots("frontier, predicted", line, "circle", BLACK, 5)
    traces.append(on_line.update(mode="lines+markers", line={"color": BLACK, "width": 2}))
    marked = _dots("preset", preset_dots(frontier, presets), "diamond", PURPLE, 14)
    return [*traces, marked.update(marker_line={"color": BLACK, "width": 1.5})]


def _names(named: Sequence[Dot]) -> list[dict[str, Any]]:
    """Annotations with the presets' names."""
    return [{"x": dot.speed_up, "y": dot.retention, "text": f"<b>{dot.label}</b>", **_NAME} for dot in named]


def _slider(
    frontiers: Sequence[Frontier], active: int, presets: Sequence[Preset], held_out: EvaluationTable | None
) -> dict[str, Any]:
    """A slider whose steps replace what the traces hold."""
    steps = []
    for frontier in frontiers:
        traces = [trace.to_plotly_json() for trace in _traces(frontier, presets, held_out)]
        data = {key: [trace.get(key) for trace in traces] for key in ("x", "y", "customdata")}
        layout = {
            "annotations": _names(preset_dots(frontier, presets)),
            "xaxis.title.text": _across(frontier),
        }
        label = f"{frontier.cost.context_length:,}"
        steps.append({"method": "update", "args": [data, layout], "label": label})
    return {"active": active, "steps": steps, "currentvalue": {"prefix": "context "}, "pad": {"t": 60}}


def quality_figure(surrogate: Surrogate, held_out: EvaluationTable | None) -> go.Figure:
    """The surrogate's prediction against the evaluated value, on fitted and on held-out placements."""
    tables = {"fitted": surrogate.table, "held out": held_out}
    pairs = {
        name: _Pairs(table.placements, table.values.tolist(), surrogate.predict(table.placements)[0].tolist())
        for name, table in tables.items()
        if table is not None
    }
    target = str(surrogate.table.target)
    return _comparison(pairs, f"evaluated {target}", f"predicted {target}")


def cost_figure(costs: Sequence[CostModel]) -> go.Figure:
    """The cost models' predicted milliseconds against measured ones, one series for each workload."""
    pairs = {
        describe_workload(cost): _Pairs(
            [step.placement for step in cost.measured],
            [1e3 * step.seconds for step in cost.measured],
            [1e3 * cost.seconds(step.placement) for step in cost.measured],
        )
        for cost in costs
    }
    return _comparison(pairs, "measured ms a step", "predicted ms a step")


def _band(line: Sequence[Dot]) -> go.Scatter:
    there_and_back = [*line, *reversed(line)]
    edge = [dot.high for dot in line] + [dot.low for dot in reversed(line)]
    return go.Scatter(
        x=[dot.speed_up for dot in there_and_back],
        y=edge,
        mode="lines",
        fill="toself",
        fillcolor="rgba(0, 0, 0, 0.10)",
        line={"width": 0},
        hoverinfo="skip",
        name="90% interval",
    )


def _dots(name: str, dots: Sequence[Dot], symbol: str, colour: str, size: int) -> go.Scatter:
    return go.Scatter(
        x=[dot.speed_up for dot in dots],
        y=[dot.retention for dot in dots],
        customdata=[[_hover(dot), str(dot.placement)] for dot in dots],
        hovertemplate=_HOVER,
        mode="markers",
        marker={"symbol": symbol, "color": colour, "size": size},
        name=name,
    )


def _hover(dot: Dot) -> str:
    name = f"<b>{dot.label}</b><br>" if dot.label else ""
    interval = f" ({dot.low:.1%} to {dot.high:.1%})" if dot.low < dot.high else ""
    origin = f"{dot.measured} measured" if dot.measured else "predicted"
    figures = f"{dot.speed_up:.2f}× speed-up, {dot.retention:.1%} retention{interval}"
    return f"{name}{_wrapped(str(dot.placement))}<br>{figures}<br>{origin}"


def _wrapped(text: str, runs: int = 8) -> str:
    """Break a placement's text into lines of some runs each."""
    words = text.split()
    return "<br>".join(" ".join(words[start : start + runs]) for start in range(0, len(words), runs))


def _comparison(series: Mapping[str, _Pairs], across: str, up: str) -> go.Figure:
    """Predictions against what was found, with the line of perfect prediction."""
    figure = go.Figure()
    for (name, pairs), (symbol, colour) in zip(series.items(), itertools.cycle(_LOOKS)):
        figure.add_trace(
            go.Scatter(
                x=pairs.found,
                y=pairs.predicted,
                customdata=[_wrapped(str(placement)) for placement in pairs.placements],
                hovertemplate="%{customdata}<br>%{x:.4g} found, %{y:.4g} predicted<extra></extra>",
                mode="markers",
                marker={"symbol": symbol, "color": colour, "size": 8},
                name=name,
            )
        )
    values = [value for pairs in series.values() for value in (*pairs.found, *pairs.predicted)]
    ends, line = [min(values), max(values)], {"color": BLACK, "width": 1, "dash": "dot"}
    figure.add_trace(go.Scatter(x=ends, y=ends, mode="lines", line=line, name="equal", hoverinfo="skip"))
    style(figure, across, up, 380)
    return figure


def style(figure: go.Figure, across: str, up: str, height: int) -> None:
    """A plain look, legible on a phone; no axis can be dragged, so that scrolling passes through."""
    axis = {"gridcolor": _GRID, "zeroline": False, "linecolor": BLACK, "ticks": "outside", "fixedrange": True}
    figure.update_layout(
        height=height,
        margin={"l": 10, "r": 10, "t": 10, "b": 10},
        plot_bgcolor="white",
        paper_bgcolor="white",
        font={"family": "system-ui, sans-serif", "size": 14, "color": "#222222"},
        legend={"orientation": "h", "yanchor": "bottom", "y": 1.02, "x": 0, "font": {"size": 12}},
        hoverlabel={"align": "left", "bgcolor": "white"},
        xaxis={**axis, "title": across, "automargin": True},
        yaxis={**axis, "title": up, "automargin": True},
    )

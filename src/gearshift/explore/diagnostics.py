"""Figures of what lies behind a frontier: layers, pairs of layers, and rankings over training."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import plotly.graph_objects as go

from gearshift.explore.effects import layer_effects, strongest_interactions
from gearshift.explore.figures import style
from gearshift.explore.palette import BLACK, PURPLE, mixer_colour
from gearshift.placement import short_name
from gearshift.search.surrogate import Surrogate

# Besides its colour every mixer has a pattern, for whoever sees none or prints in grey.
_PATTERNS = ("", "/", ".", "x", "-", "+")
# Colour, symbol and dash of a figure's lines.
_FIRST, _SECOND = (BLACK, "circle", "solid"), (PURPLE, "diamond", "dash")


def importance_figure(surrogate: Surrogate) -> go.Figure:
    """What each layer loses with each mixer, one bar a mixer."""
    space, effects = surrogate.table.space, layer_effects(surrogate)
    figure = go.Figure()
    for number, mixer in enumerate(space.mixers):
        if np.nanmax(np.abs(effects[:, number]), initial=0.0) == 0:
            continue  # the reference itself
        pattern = {"shape": _PATTERNS[number % len(_PATTERNS)]}
        figure.add_trace(
            go.Bar(
                x=list(range(space.num_layers)),
                y=[None if np.isnan(value) else value for value in effects[:, number].tolist()],
                name=short_name(mixer),
                marker={"color": mixer_colour(mixer), "pattern": pattern},
                hovertemplate=f"layer %{{x}} with {short_name(mixer)}: %{{y:.4g}}<extra></extra>",
            )
        )
    style(figure, "layer", f"change of {surrogate.table.target}", 380)
    figure.update_layout(barmode="group")
    return figure


def interaction_figure(surrogate: Surrogate) -> go.Figure:
    """For each pair of layers, how far their changes do not simply add up."""
    layers, found = surrogate.table.space.num_layers, strongest_interactions(surrogate)
    values, texts = np.full((layers, layers), np.nan), np.full((layers, layers), "", dtype=object)
    for pair in found:
        i, j = pair.layers
        values[j, i] = values[i, j] = pair.value
        names = [short_name(mixer) for mixer in pair.mixers]
        texts[j, i] = texts[i, j] = (
            f"layer {i} with {names[0]} and layer {j} with {names[1]}: {pair.value:+.4g} together"
        )
    largest = max((abs(pair.value) for pair in found), default=1.0)
    figure = go.Figure(
        go.Heatmap(
            z=[[None if np.isnan(value) else value for value in row] for row in values.tolist()],
            text=texts.tolist(),
            hovertemplate="%{text}<extra></extra>",
            hoverongaps=False,
            # Blue and red differ in every kind of colour blindness; white is no interaction.
            colorscale="RdBu",
            zmin=-largest,
            zmax=largest,
            showscale=bool(found),
        )
    )
    style(figure, "layer", "layer", 380)
    figure.update_layout(plot_bgcolor="#f6f6f6")
    if not found:
        figure.add_annotation(
            text="none: the effects of layers add up",
            x=0.5,
            y=0.5,
            xref="paper",
            yref="paper",
            showarrow=False,
        )
        figure.update_layout(xaxis_range=[0, layers - 1], yaxis_range=[0, layers - 1])
    return figure


def stability_figures(stability: Mapping[str, Any]) -> list[go.Figure]:
    """Rank correlation with the last checkpoint, and regret of an early pick, over training."""
    correlation, regret = go.Figure(), go.Figure()
    for run in stability["runs"]:
        suffix = f", seed {run['seed']}" if len(stability["runs"]) > 1 else ""
        for figure, name, column, looks in (
            (correlation, "all placements", "spearman", _FIRST),
            (correlation, "frontier", "frontier_spearman", _SECOND),
            (regret, "mean over budgets", "mean_regret", _FIRST),
            (regret, "worst budget", "worst_regret", _SECOND),
        ):
            figure.add_trace(_line(name + suffix, run["checkpoints"], column, looks))
    style(correlation, "training step", "Spearman with the last checkpoint", 340)
    style(regret, "training step", f"regret of an early pick ({stability['target']})", 340)
    return [correlation, regret]


def _line(
    name: str, checkpoints: Sequence[Mapping[str, Any]], column: str, looks: tuple[str, str, str]
) -> go.Scatter:
    """Values with their intervals; what is not defined is left out."""
    colour, symbol, dash = looks
    known = [(one["step"], one[column]) for one in checkpoints if one[column]["value"] is not None]
    above = [(one["high"] if one["high"] is not None else one["value"]) - one["value"] for _, one in known]
    below = [one["value"] - (one["low"] if one["low"] is not None else one["value"]) for _, one in known]
    return go.Scatter(
        x=[step for step, _ in known],
        y=[one["value"] for _, one in known],
        error_y={"type": "data", "array": above, "arrayminus": below, "color": colour, "thickness": 1},
        mode="lines+markers",
        line={"color": colour, "dash": dash},
        marker={"symbol": symbol, "size": 8},
        name=name,
    )

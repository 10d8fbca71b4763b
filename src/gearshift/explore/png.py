"""The frontier as a picture for a README."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import Patch, Rectangle
from matplotlib.patheffects import withStroke
from matplotlib.ticker import FuncFormatter, PercentFormatter

from gearshift.explore.palette import BLACK, GREY, PURPLE, mixer_colour, text_colour
from gearshift.explore.series import describe_workload, evaluated_dots, frontier_dots, preset_dots
from gearshift.files import atomic_file
from gearshift.placement import short_name
from gearshift.presets import Preset
from gearshift.search.frontier import Frontier

# Cells of more layers than this are too narrow for the mixer's name.
_NAMED_CELLS = 24


def write_frontier_png(
    path: Path, frontier: Frontier, presets: Sequence[Preset], *, title: str = "One checkpoint, many speeds"
) -> Path:
    """Draw the frontier, and below it the layers of each preset.

    Args:
        path: the ``.png`` file, replaced in one step.
        frontier: what to draw.
        presets: at least one; drawn where they were measured, else where they are predicted.
        title: heading of the picture.
    """
    figure = Figure(figsize=(10, 5.6 + 0.42 * len(presets)), dpi=160, layout="constrained")
    figure.get_layout_engine().set(w_pad=0.12, h_pad=0.12)  # pyright: ignore - the constrained layout has pads
    FigureCanvasAgg(figure)
    upper, lower = figure.subplots(2, 1, height_ratios=[4.6, 0.3 + 0.42 * len(presets)])
    figure.suptitle(title, fontsize=17, fontweight="bold", x=0.02, ha="left")
    _draw_frontier(upper, frontier, presets)
    _draw_layers(lower, presets, frontier.surrogate.table.space.mixers)
    with atomic_file(Path(path)) as partial:
        figure.savefig(partial, format="png")
    return Path(path)


def _draw_frontier(axes: Axes, frontier: Frontier, presets: Sequence[Preset]) -> None:
    line = frontier_dots(frontier)
    speeds = [dot.speed_up for dot in line]
    axes.fill_between(
        speeds,
        [dot.low for dot in line],
        [dot.high for dot in line],
        color=BLACK,
        alpha=0.1,
        lw=0,
        label="90% interval",
    )
    dots = evaluated_dots(frontier, frontier.surrogate.table)
    axes.scatter(
        [dot.speed_up for dot in dots],
        [dot.retention for dot in dots],
        s=26,
        facecolors="none",
        edgecolors=GREY,
        label="evaluated",
    )
    axes.plot(
        speeds,
        [dot.retention for dot in line],
        color=BLACK,
        lw=2,
        marker="o",
        ms=3,
        label="frontier, predicted",
    )
    _draw_presets(axes, frontier, presets)
    axes.set_xlabel(f"speed-up over the teacher ({describe_workload(frontier.cost)})", fontsize=12)
    axes.set_ylabel("retention of quality", fontsize=12)
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}×"))
    axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    axes.grid(color="#e6e6e6")
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=10, loc="lower right")


def _draw_presets(axes: Axes, frontier: Frontier, presets: Sequence[Preset]) -> None:
    dots = preset_dots(frontier, presets)
    axes.scatter(
        [dot.speed_up for dot in dots],
        [dot.retention for dot in dots],
        s=95,
        marker="D",
        color=PURPLE,
        edgecolors=BLACK,
        linewidths=1.3,
        zorder=4,
        label="preset",
    )
    for number, dot in enumerate(sorted(dots, key=lambda dot: dot.speed_up)):
        text = f"{dot.label}  {dot.speed_up:.2f}×, {dot.retention:.0%}"
        # By turns above and below, so that neighbours of like quality do not write over each other.
        offset = (9, 7) if number % 2 == 0 else (9, -17)
        label = axes.annotate(
            text, (dot.speed_up, dot.retention), offset, textcoords="offset points", zorder=5
        )
        label.set(fontsize=11, fontweight="bold", path_effects=[withStroke(linewidth=3, foreground="white")])
    speeds = [*axes.get_xlim(), *(dot.speed_up for dot in dots)]
    # The names stand to the right of their presets, and the fastest one's needs room.
    axes.set_xlim(min(speeds), max(speeds) + 0.2 * (max(speeds) - min(speeds)))


def _draw_layers(axes: Axes, presets: Sequence[Preset], mixers: Sequence[str]) -> None:
    """One row of coloured cells a preset, the first layer on the left."""
    layers = max(len(preset.placement) for preset in presets)
    for row, preset in enumerate(presets):
        for layer, mixer in enumerate(preset.placement):
            axes.add_patch(Rectangle((layer + 0.03, row + 0.1), 0.94, 0.8, color=mixer_colour(mixer), lw=0))
            if layers <= _NAMED_CELLS:
                middle = (layer + 0.5, row + 0.52)
                axes.text(
                    *middle,
                    short_name(mixer),
                    color=text_colour(mixer),
                    fontsize=10,
                    ha="center",
                    va="center",
                )
    axes.set(xlim=(0, layers), ylim=(len(presets), 0), xticks=[])
    axes.set_yticks(
        [row + 0.5 for row in range(len(presets))], [preset.name for preset in presets], fontsize=11
    )
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    handles = [Patch(color=mixer_colour(mixer), label=mixer.replace("_", " ")) for mixer in mixers]
    axes.legend(
        handles=handles,
        ncols=len(mixers),
        frameon=False,
        fontsize=10,
        loc="lower left",
        bbox_to_anchor=(0, 1),
    )

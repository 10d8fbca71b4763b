"""``gearshift runs``: look at training runs."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from gearshift.train.show import Summary

KEPT = "nothing was changed"

app = typer.Typer(help="Look at training runs.", no_args_is_help=True)


def show(
    directory: Annotated[Path, typer.Argument(help="A run directory.")],
    plot: Annotated[Path | None, typer.Option(help="Also draw the curves, as a PNG at this path.")] = None,
    parts: Annotated[int, typer.Option(min=1, help="About how many rows the table has.")] = 12,
) -> None:
    """Show how a training run goes: losses, distances to the teacher, speed, held-out retention."""
    from gearshift.cli.tables import print_table
    from gearshift.train.show import plot_run, read_run, summarise

    rows = read_run(directory)
    summaries = summarise(rows, parts)
    mixers = list(dict.fromkeys(name for summary in summaries for name in summary.mixers))
    placements = list(dict.fromkeys(name for summary in summaries for name in summary.retention))
    columns = ("steps", "stage", "loss", *mixers, "tokens", "tokens/s", *placements)
    print_table(str(directory), columns, (tuple(_cells(s, mixers, placements)) for s in summaries))
    if mixers:
        typer.echo("under a mixer's name: mean distance of its outputs to the teacher's")
    if placements:
        typer.echo("under a placement's name: held-out retention")
    if plot is not None:
        plot_run(rows, plot)
        typer.echo(f"curves written to {plot}")


def _cells(summary: Summary, mixers: list[str], placements: list[str]) -> Iterator[str]:
    yield summary.steps
    yield summary.stage
    yield "-" if summary.loss is None else f"{summary.loss:.4f}"
    for name in mixers:
        yield f"{summary.mixers[name]:.3f}" if name in summary.mixers else "-"
    yield f"{summary.tokens:,}"
    yield f"{summary.tokens_per_second:,.0f}"
    for name in placements:
        yield f"{summary.retention[name]:.1%}" if name in summary.retention else "-"


COMMANDS = {"show": show}

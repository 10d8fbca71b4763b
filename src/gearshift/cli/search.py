"""``gearshift search``: from rows of measurements to the frontier, its pictures and presets."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from gearshift.errors import GearshiftError
from gearshift.files import read_json_lines
from gearshift.placement import Placement, PlacementSpace

if TYPE_CHECKING:
    from gearshift.find_presets import Found

KEPT = "the files that were complete are in the output folder; run the same command again"


class NoRowsError(GearshiftError):
    """A file of rows is missing or empty."""


def run(
    table: Annotated[Path, typer.Option(help="Rows that 'gearshift evaluate' wrote.")],
    cost: Annotated[Path, typer.Option(help="Rows that 'gearshift bench' wrote.")],
    out: Annotated[Path, typer.Option(help="The folder for surrogate, costs, frontier and pictures.")],
    supernet: Annotated[
        Path | None, typer.Option(help="Write presets.json into this supernet directory.")
    ] = None,
    context: Annotated[
        int | None, typer.Option(help="The context length to search for; by default the longest measured.")
    ] = None,
    target: Annotated[
        str, typer.Option(help="What to predict: '-sqrt(kl)', '-loss', 'quality', 'recall.copy' ...")
    ] = "-sqrt(kl)",
    interaction_range: Annotated[
        int | None, typer.Option("--range", help="How far layers interact; by default the evidence chooses.")
    ] = None,
) -> None:
    """Fit surrogate and costs, find the frontier exactly, and choose presets along it."""
    from gearshift.inspect_directory import supernet_space

    evaluations, measurements = _read(table, "gearshift evaluate"), _read(cost, "gearshift bench")
    space = supernet_space(supernet) if supernet else _space_of(evaluations, measurements)

    from gearshift.find_presets import find_presets, write_found

    found = find_presets(
        evaluations,
        measurements,
        space,
        context_length=context,
        target=target,
        interaction_range=interaction_range,
    )
    _print(found)
    write_found(found, out, supernet)
    typer.echo(f"written to {out}" + (f"; presets to {supernet / 'presets.json'}" if supernet else ""))


def _read(path: Path, writer: str) -> list[dict[str, Any]]:
    rows = read_json_lines(path) if path.exists() else []
    if not rows:
        raise NoRowsError(f"{path} is missing or holds no rows; write some with {writer}")
    return rows


def _space_of(
    evaluations: Sequence[Mapping[str, Any]], measurements: Sequence[Mapping[str, Any]]
) -> PlacementSpace:
    """The smallest space that holds what was evaluated and measured: no layer gets a mixer never seen there.

    Mixers that only the measurements have are left out: nothing is known of their quality.
    """
    evaluated = [Placement.of(row.get("placement", "")) for row in evaluations]
    evaluated = [placement for placement in evaluated if len(placement) == len(evaluated[0])]
    used = {mixer for placement in evaluated for mixer in placement}
    measured = [Placement.of(row["placement"]) for row in measurements if "placement" in row]
    seen = [*evaluated, *(placement for placement in measured if len(placement) == len(evaluated[0]))]
    layers = range(len(evaluated[0]))
    by_layer = tuple(tuple({placement[layer] for placement in seen} & used) for layer in layers)
    return PlacementSpace(len(layers), tuple(used), by_layer)


def _print(found: Found) -> None:
    from gearshift.cli.tables import print_table

    typer.echo(str(found.frontier.surrogate.report))
    typer.echo(str(found.frontier.cost))
    columns = ("preset", "placement", "retention measured", "predicted", "speed-up predicted")
    print_table("presets", columns, _cells(found))


def _cells(found: Found) -> Iterator[tuple[str, ...]]:
    points = found.frontier.predict([preset.placement for preset in found.presets])
    for preset, point in zip(found.presets, points, strict=True):
        measured = "-" if preset.retention is None else f"{preset.retention:.1%}"
        yield preset.name, str(preset.placement), measured, f"{point.retention:.1%}", f"{point.speed_up:.2f}"

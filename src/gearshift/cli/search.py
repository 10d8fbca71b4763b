"""``gearshift search``: from rows of measurements to the frontier, its pictures and presets."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from gearshift.cli.options import DeviceOption, read_rows
from gearshift.cli.search_options import (
    AtLeastOption,
    AtMostOption,
    BatchOption,
    ContextOption,
    DataOption,
    EvaluationsOption,
    FixOption,
    FloorOption,
    OrderOption,
    RangeOption,
    RecallOption,
    SeedOption,
    SequenceOption,
    TargetOption,
    TokensOption,
    ToleranceOption,
    read_wishes,
)
from gearshift.errors import GearshiftError
from gearshift.placement import Placement, PlacementSpace

if TYPE_CHECKING:
    from gearshift.find_presets import Found, Wishes

KEPT = "what was evaluated and written is kept; run the same command again to go on from there"


class NoSupernetError(GearshiftError):
    """Placements shall be evaluated, and no supernet is named."""


def run(
    table: Annotated[Path, typer.Option(help="Rows that 'gearshift evaluate' wrote; --data adds more.")],
    cost: Annotated[Path, typer.Option(help="Rows that 'gearshift bench' wrote.")],
    out: Annotated[Path, typer.Option(help="The folder for surrogate, costs, frontier and pictures.")],
    supernet: Annotated[
        Path | None, typer.Option(help="Write presets.json into this supernet directory.")
    ] = None,
    context: ContextOption = None,
    target: TargetOption = "-sqrt(kl)",
    order: OrderOption = None,
    interaction_range: RangeOption = None,
    at_least: AtLeastOption = None,
    at_most: AtMostOption = None,
    fix: FixOption = None,
    floor: FloorOption = None,
    data: DataOption = None,
    recall: RecallOption = None,
    evaluations: EvaluationsOption = 200,
    batch: BatchOption = 16,
    tolerance: ToleranceOption = 0.005,
    seed: SeedOption = 0,
    tokens: TokensOption = 32768,
    sequence_length: SequenceOption = 512,
    device: DeviceOption = "auto",
) -> None:
    """Fit surrogate and costs, find the frontier exactly, and choose presets along it.

    Without --data the rows of the table are all there is. With it, placements are proposed, evaluated and
    added to the table, round after round, until the frontier stands still or the evaluations are spent.
    """
    wishes = read_wishes(at_least, at_most, fix, floor)
    measurements = read_rows(cost, "gearshift bench")
    if data is None:
        rows = read_rows(table, "gearshift evaluate")
    else:
        held_out = (data, recall, tokens, sequence_length, device)
        plan = (target, evaluations, batch, tolerance, seed, order, interaction_range)
        rows = _search_actively(supernet, table, measurements, out, context, wishes, held_out, plan)
    space = _space(supernet, rows, measurements)

    from gearshift.find_presets import find_presets, write_found

    found = find_presets(
        rows,
        measurements,
        space,
        context_length=context,
        target=target,
        order=order,
        interaction_range=interaction_range,
        wishes=wishes,
    )
    _print(found)
    write_found(found, out, supernet)
    typer.echo(f"written to {out}" + (f"; presets to {supernet / 'presets.json'}" if supernet else ""))


def _search_actively(
    supernet: Path | None,
    table: Path,
    measurements: Sequence[Mapping[str, Any]],
    out: Path,
    context: int | None,
    wishes: Wishes,
    held_out: tuple[Path, Path | None, int, int, str],
    plan: tuple[str, int, int, float, int, int | None, int | None],
) -> Sequence[Mapping[str, Any]]:
    """The rows of an active search; settings come as the options give them."""
    if supernet is None:
        raise NoSupernetError("--data asks for evaluations; say of which supernet with --supernet")
    _space(supernet, (), ())
    from gearshift.search.active import Plan
    from gearshift.search_supernet import HeldOutText, search_supernet

    data, recall, tokens, sequence_length, device = held_out
    target, evaluations, batch, tolerance, seed, order, interaction_range = plan
    searched = search_supernet(
        supernet,
        table,
        HeldOutText(data, recall, tokens, sequence_length, device=device),
        measurements,
        Plan(
            target,
            evaluations,
            batch,
            tolerance,
            seed=seed,
            order=order,
            interaction_range=interaction_range,
        ),
        out,
        context_length=context,
        constraints=wishes.constraints,
    )
    typer.echo(f"{len(searched.rows)} placements evaluated: {searched.why_ended}")
    return searched.rows


def _space(
    supernet: Path | None, evaluations: Sequence[Mapping[str, Any]], measurements: Sequence[Mapping[str, Any]]
) -> PlacementSpace:
    from gearshift.inspect_directory import supernet_space

    return supernet_space(supernet) if supernet else _space_of(evaluations, measurements)


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
    for name, surrogate in found.floors.items():
        typer.echo(f"floor of {name}, {surrogate.report}")
    typer.echo(str(found.frontier.cost))
    columns = ("preset", "placement", "retention measured", "predicted", "speed-up predicted")
    print_table("presets", columns, _cells(found))


def _cells(found: Found) -> Iterator[tuple[str, ...]]:
    points = found.frontier.predict([preset.placement for preset in found.presets])
    for preset, point in zip(found.presets, points, strict=True):
        measured = "-" if preset.retention is None else f"{preset.retention:.1%}"
        yield preset.name, str(preset.placement), measured, f"{point.retention:.1%}", f"{point.speed_up:.2f}"

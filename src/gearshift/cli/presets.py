"""``gearshift presets``: build a supernet's presets for workloads and retentions."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from gearshift.cli.options import DeviceOption, SupernetArgument
from gearshift.cli.search_options import (
    AtLeastOption,
    AtMostOption,
    DataOption,
    FixOption,
    FloorOption,
    OrderOption,
    RangeOption,
    SequenceOption,
    TargetOption,
    TokensOption,
    read_wishes,
)
from gearshift.cli.tables import print_table, say_written

if TYPE_CHECKING:
    from gearshift.build_presets import Built
    from gearshift.presets import Preset

KEPT = "what was evaluated is in the table; run the same command again"

app = typer.Typer(help="A supernet's presets: placements with names and measurements.", no_args_is_help=True)


def build(
    supernet: SupernetArgument,
    table: Annotated[Path, typer.Option(help="Rows that 'gearshift evaluate' wrote; --data adds more.")],
    cost: Annotated[Path, typer.Option(help="Rows that 'gearshift bench' wrote.")],
    retention: Annotated[
        list[float], typer.Option(help="Percent of the teacher's quality to keep. May be repeated.")
    ] = [99.0, 97.0, 95.0, 90.0],  # noqa: B006 - typer copies it
    context: Annotated[
        list[int] | None, typer.Option(help="A measured context length. May be repeated; all by default.")
    ] = None,
    ceiling: Annotated[
        int | None, typer.Option(help="Bytes of weights for all presets together, as 'gearshift thin' keeps.")
    ] = None,
    cautious: Annotated[
        bool, typer.Option("--cautious", help="Ask for the retention with a probability of 90%.")
    ] = False,
    target: TargetOption = "-sqrt(kl)",
    order: OrderOption = None,
    interaction_range: RangeOption = None,
    at_least: AtLeastOption = None,
    at_most: AtMostOption = None,
    fix: FixOption = None,
    floor: FloorOption = None,
    data: DataOption = None,
    tokens: TokensOption = 32768,
    sequence_length: SequenceOption = 512,
    device: DeviceOption = "auto",
) -> None:
    """Write presets.json: for each workload and retention the fastest placement that keeps so much.

    With --data the presets are evaluated, and one that keeps too little is replaced by a better one; and
    their decode steps are measured. Give the text and the sizes of the table's own rows.
    """
    from gearshift.build_supernet_presets import Asked, Measuring, build_supernet_presets

    asked = Asked(
        table,
        cost,
        tuple(level / 100 for level in retention),
        tuple(context or ()),
        target,
        order,
        interaction_range,
        read_wishes(at_least, at_most, fix, floor),
        ceiling,
        cautious,
    )
    measuring = None if data is None else Measuring(data, tokens, sequence_length, device)
    surrogate, built, presets = build_supernet_presets(supernet, asked, measuring)
    typer.echo(str(surrogate.report))
    columns = ("preset", "placement", "retention predicted", "measured", "speed-up predicted", "measured")
    print_table("presets", columns, _cells(built, presets))
    names = ",".join(each.wish.name for each in built)
    say_written(
        supernet / "presets.json",
        "presets",
        next_step=f"gearshift thin {supernet} OUT --presets {names}",
        notes=_misses(built, {preset.name: preset for preset in presets}),
    )


COMMANDS = {"build": build}


def _cells(built: Sequence[Built], presets: Sequence[Preset]) -> Iterator[tuple[str, ...]]:
    by_name = {preset.name: preset for preset in presets}
    for each in built:
        preset, cost = by_name[each.wish.name], each.wish.cost
        speeds = [
            f"{measured.speed_up:.2f}"
            for measured in preset.measurements
            if (measured.workload.context_length, measured.workload.concurrency)
            == (cost.context_length, cost.batch_size)
        ]
        kept = "-" if preset.retention is None else f"{preset.retention:.1%}"
        predicted = f"{each.point.retention:.1%}", kept, f"{each.point.speed_up:.2f}"
        yield preset.name, str(preset.placement), *predicted, speeds[0] if speeds else "-"


def _misses(built: Sequence[Built], presets: Mapping[str, Any]) -> Iterator[str]:
    for each in built:
        kept = presets[each.wish.name].retention
        if each.wish.missed_by(kept):
            yield (
                f"WARNING: {each.wish.name} keeps {kept:.1%} as evaluated, less than asked; evaluate more "
                "placements near the frontier with gearshift search --data, or use --cautious"
            )

"""``gearshift bench``: seconds of a decode step, measured on this machine."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from gearshift.cli.options import (
    DeviceOption,
    PlacementOption,
    PresetsOption,
    RandomOption,
    SupernetArgument,
    asked_placements,
    gibibytes,
)
from gearshift.cli.tables import print_table

KEPT = "nothing was added to the output file; run the same command again"


def run(
    supernet: SupernetArgument,
    out: Annotated[Path, typer.Option(help="The file to append rows to, a .jsonl file.")],
    context: Annotated[
        list[int], typer.Option(min=1, help="Cached tokens of each sequence. May be repeated.")
    ] = [512, 2048],  # noqa: B006 - typer copies it
    batch: Annotated[int, typer.Option(min=1, help="Sequences decoded together.")] = 1,
    memory: Annotated[
        float | None,
        typer.Option(min=0, help="GiB for caches; as many sequences run as fit."),
    ] = None,
    prefill: Annotated[
        bool, typer.Option("--prefill", help="Also time a prompt as long as the context.")
    ] = False,
    placement: PlacementOption = None,
    presets: PresetsOption = False,
    random_count: RandomOption = 0,
    seed: Annotated[int, typer.Option(help="Seed of the random placements and caches.")] = 0,
    device: DeviceOption = "auto",
) -> None:
    """Measure decoding; without any placement named, what a cost model needs is measured."""
    wanted = asked_placements(supernet, placement or (), presets, random_count, seed)

    from gearshift.bench.decode import DecodeSettings, cost_placements, measure_decode
    from gearshift.files import append_json_line, check_appendable
    from gearshift.supernet import load_supernet
    from gearshift.train.device import choose_device

    check_appendable(out)
    model = load_supernet(supernet, device=choose_device(device))
    settings = DecodeSettings(batch, gibibytes(memory), prefill, seed=seed)
    rows = measure_decode(model, wanted or cost_placements(model.placement_space), context, settings)
    for row in rows:
        append_json_line(out, row)
    print_table(str(out), ("placement", "context", "batch", "ms a step", "least", "most"), _cells(rows))


def _cells(rows: Sequence[Mapping[str, Any]]) -> Iterator[tuple[str, ...]]:
    for row in rows:
        times = (row[key] for key in ("seconds_per_step", "seconds_least", "seconds_most"))
        sizes = (str(row["context_length"]), str(row["batch_size"]))
        yield row["placement"], *sizes, *(f"{1e3 * seconds:.2f}" for seconds in times)

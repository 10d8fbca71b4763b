"""``gearshift evaluate``: quality of placements on held-out data, a row each."""

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
)
from gearshift.cli.tables import print_table
from gearshift.errors import GearshiftError

KEPT = "the rows that were done are in the table; run the same command again to go on from there"


class NothingAskedError(GearshiftError):
    """A command was given no placement to work on."""


def run(
    supernet: SupernetArgument,
    data: Annotated[Path, typer.Option(help="Held-out text: .jsonl, .txt, .py or a folder of .py files.")],
    out: Annotated[Path, typer.Option(help="The table to append rows to, a .jsonl file.")],
    recall: Annotated[Path | None, typer.Option(help="Recall examples, a .jsonl file.")] = None,
    placement: PlacementOption = None,
    presets: PresetsOption = False,
    random_count: RandomOption = 0,
    seed: Annotated[int, typer.Option(help="Seed of the random placements.")] = 0,
    tokens: Annotated[int, typer.Option(help="How many tokens of the data to use at most.")] = 32768,
    sequence_length: Annotated[int, typer.Option(help="Tokens that a placement sees at a time.")] = 512,
    batch_size: Annotated[int, typer.Option(help="Sequences at a time.")] = 8,
    device: DeviceOption = "auto",
) -> None:
    """Measure how good placements are on text that no training step has seen."""
    wanted = asked_placements(supernet, placement or (), presets, random_count, seed)
    if not wanted:
        raise NothingAskedError("no placement to evaluate; give --placement, --presets or --random")

    from gearshift.evaluate.quality import evaluate_placements

    rows = evaluate_placements(
        supernet,
        wanted,
        data,
        recall,
        out,
        tokens=tokens,
        sequence_length=sequence_length,
        batch_size=batch_size,
        device=device,
    )
    print_table(str(out), ("placement", "loss", "kl", "retention", "recall"), _cells(rows))


def _cells(rows: Sequence[Mapping[str, Any]]) -> Iterator[tuple[str, ...]]:
    for row in rows:
        recall = ", ".join(f"{task} {accuracy:.0%}" for task, accuracy in row["recall"].items())
        numbers = (f"{row['loss']:.4f}", f"{row['kl']:.4f}", f"{row['retention']:.1%}")
        yield row["placement"], *numbers, recall or "-"

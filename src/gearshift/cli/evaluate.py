"""``gearshift evaluate``: quality of placements on held-out data, a row each; tables of shards, merged."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperGroup

from gearshift.cli.options import (
    DeviceOption,
    PlacementOption,
    PresetsOption,
    RandomOption,
    SupernetArgument,
    asked_placements,
)
from gearshift.cli.tables import print_table, say_written
from gearshift.errors import GearshiftError
from gearshift.evaluate.shard import Shard

if TYPE_CHECKING:
    from gearshift.evaluate.evaluator import Speed

KEPT = "the rows that were done are in the table; run the same command again to go on from there"

DataOption = Annotated[Path, typer.Option(help="Held-out text: .jsonl, .txt, .py or a folder of .py files.")]
RecallOption = Annotated[Path | None, typer.Option(help="Recall examples, a .jsonl file.")]
OutOption = Annotated[Path, typer.Option(help="The table to append rows to, a .jsonl file.")]
TokensOption = Annotated[int, typer.Option(help="How many tokens of the data to use at most.")]
LengthOption = Annotated[int, typer.Option(help="Tokens that a placement sees at a time.")]


class _RunsByDefault(TyperGroup):
    """``gearshift evaluate SUPERNET ...`` is ``gearshift evaluate run SUPERNET ...``."""

    def parse_args(  # pyright: ignore[reportIncompatibleMethodOverride] - typer has a click of its own
        self, ctx: typer.Context, args: list[str]
    ) -> list[str]:
        if args and args[0] not in (*self.commands, "--help"):
            args = ["run", *args]
        return super().parse_args(ctx, args)


app = typer.Typer(
    cls=_RunsByDefault,
    help="Measure how good placements are on text that no training step has seen. "
    "'gearshift evaluate SUPERNET ...' is 'gearshift evaluate run SUPERNET ...'.",
    no_args_is_help=True,
)


class NothingAskedError(GearshiftError):
    """A command was given no placement to work on."""


def run(
    supernet: SupernetArgument,
    data: DataOption,
    out: OutOption,
    recall: RecallOption = None,
    placement: PlacementOption = None,
    presets: PresetsOption = False,
    random_count: RandomOption = 0,
    seed: Annotated[int, typer.Option(help="Seed of the random placements.")] = 0,
    tokens: TokensOption = 32768,
    sequence_length: LengthOption = 512,
    batch_size: Annotated[
        int | None, typer.Option(min=1, help="Sequences at a time; without it, as many as fit.")
    ] = None,
    shard: Annotated[
        str | None, typer.Option(help="Only a part of the placements, such as 2/4; give each its own --out.")
    ] = None,
    device: DeviceOption = "auto",
) -> None:
    """Evaluate placements of a supernet; rows that are in the table already are kept."""
    part = None if shard is None else Shard.parse(shard)
    wanted = asked_placements(supernet, placement or (), presets, random_count, seed)
    if not wanted:
        raise NothingAskedError("no placement to evaluate; give --placement, --presets or --random")

    from gearshift.evaluate.quality import evaluate_placements

    speeds: list[Speed] = []
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
        shard=part,
        tell_speed=speeds.append,
    )
    print_table(str(out), ("placement", "loss", "kl", "retention", "recall"), _cells(rows))
    for speed in speeds:
        typer.echo(str(speed))
    next_step = (
        f"gearshift search --table {out} --cost ROWS --out FOLDER"
        if part is None
        else f"gearshift evaluate merge {out} OTHER_SHARDS --out TABLE"
    )
    say_written(out, f"{len(rows)} rows", next_step)


def merge(
    tables: Annotated[list[Path], typer.Argument(help="Tables that shards wrote.")],
    out: Annotated[Path, typer.Option(help="The table to write; may be one of them.")],
) -> None:
    """Merge the tables of shards; rows that contradict each other are refused."""
    from gearshift.evaluate.merge import merge_tables

    merged = merge_tables(tables, out)
    next_step = f"gearshift search --table {out} --cost ROWS --out FOLDER"
    say_written(out, f"{merged.rows} rows of {len(tables)} tables", next_step, merged.notes())


def endpoint(
    url: Annotated[
        str, typer.Argument(help="Where an OpenAI-style API is, such as http://127.0.0.1:8000/v1.")
    ],
    supernet: Annotated[Path, typer.Option(help="The served directory, for its tokenizer and digest.")],
    data: DataOption,
    out: OutOption,
    model: Annotated[
        list[str] | None,
        typer.Option(help="A served name, such as 'supernet:fast'; may be repeated. Without any, all."),
    ] = None,
    recall: RecallOption = None,
    tokens: TokensOption = 32768,
    sequence_length: LengthOption = 512,
    key_env: Annotated[
        str | None, typer.Option(help="The environment variable that holds the API's key.")
    ] = None,
) -> None:
    """Evaluate what a server serves, by the log-likelihoods that it reports."""
    import os

    from gearshift.evaluate.endpoint import Endpoint, evaluate_endpoint

    served = Endpoint(url, os.environ.get(key_env) if key_env else None)
    rows = evaluate_endpoint(
        served, model, supernet, data, recall, out, tokens=tokens, sequence_length=sequence_length
    )
    print_table(str(out), ("placement", "loss", "kl", "retention", "recall"), _cells(rows))
    say_written(out, f"{len(rows)} rows", f"gearshift search --table {out} --cost ROWS --out FOLDER")


def _cells(rows: Sequence[Mapping[str, Any]]) -> Iterator[tuple[str, ...]]:
    for row in rows:
        recall = ", ".join(f"{task} {accuracy:.0%}" for task, accuracy in row["recall"].items())
        kl = "-" if row["kl"] is None else f"{row['kl']:.4f}"
        yield row["placement"], f"{row['loss']:.4f}", kl, f"{row['retention']:.1%}", recall or "-"


COMMANDS = {"run": run, "merge": merge, "endpoint": endpoint}

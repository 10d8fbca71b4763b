"""``gearshift convert``: a teacher directory in, a supernet directory out."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from gearshift.convert.plan import Plan
    from gearshift.convert.plan_groups import PlanGroup, PlanRow

KEPT = "nothing was written; run the same command again"
COLUMNS = ("tensor", "from", "shape", "dtype", "bytes")
# Python, torch and Transformers, before any tensor.
PROGRAM_BYTES = 500_000_000


def run(
    teacher: Annotated[
        Path, typer.Argument(help="A pretrained model's directory (config.json, *.safetensors).")
    ],
    out: Annotated[Path, typer.Argument(help="The supernet directory to make.")],
    mixers: Annotated[
        str | None,
        typer.Option(
            help="The mixers of every layer, comma-separated: fa,swa,gdn,kda if left out, or all that a "
            "Super Apriel checkpoint holds.",
        ),
    ] = None,
    window: Annotated[
        int | None, typer.Option(help="Sliding window in tokens; chosen for you if left out.")
    ] = None,
    init: Annotated[
        str | None,
        typer.Option(help="How new mixers start: aligned if left out, or modulo to compare with."),
    ] = None,
    seed: Annotated[int, typer.Option(help="Seed of the new mixers' random parts.")] = 0,
    extra: Annotated[
        bool,
        typer.Option(help="Carry along what no text needs, such as a vision tower, in OUT/teacher_extra."),
    ] = True,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Say what would be written, and write nothing.")
    ] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace what is at OUT.")] = False,
) -> None:
    """Give every layer of a teacher its mixers, or read Super Apriel: the result is a supernet."""
    from gearshift.cli.memory import keep_freed_memory
    from gearshift.cli.tables import say_written
    from gearshift.convert.convert import check_output, plan_conversion
    from gearshift.convert.plan import run_plan
    from gearshift.placement import long_name
    from gearshift.supernet.tensor_files import TensorFiles

    check_output(teacher, out, overwrite)
    names = None if mixers is None else tuple(long_name(name.strip()) for name in mixers.split(","))
    plan = plan_conversion(teacher, mixers=names, window=window, init=init, seed=seed, extra=extra)
    if dry_run:
        _print_plan(plan, out)
        return
    keep_freed_memory()
    written = run_plan(plan, TensorFiles(teacher), out, overwrite=overwrite, progress=True)
    say_written(written, "supernet", next_step=f"gearshift info {written}")


def _print_plan(plan: Plan, out: Path) -> None:
    """A table for each kind of layer, then the totals."""
    from gearshift.cli.tables import print_table
    from gearshift.convert.plan import free_bytes
    from gearshift.convert.plan_groups import plan_groups

    for group in plan_groups(plan):
        total = ("one such layer" if group.layers else "all of it", "", "", "", f"{group.nbytes:,}")
        print_table(group.title, COLUMNS, [*_lines(group), total])
    if plan.extra:
        size = sum(tensor.info.nbytes for tensor in plan.extra)
        typer.echo(f"carried along in teacher_extra: {len(plan.extra)} tensors, {size:,} bytes")
    typer.echo(f"to be written: {plan.nbytes:,} bytes, {plan.shards} weight files")
    typer.echo(f"free on the disk: {free_bytes(out):,} bytes")
    typer.echo(f"memory: {plan.memory:,} bytes for tensors, besides {PROGRAM_BYTES:,} or so for the program")
    typer.echo("nothing was written")


def _lines(group: PlanGroup) -> Iterator[tuple[str, ...]]:
    """A line for each tensor; a mixer has one in front that says what all its tensors are made from."""
    for mixer, members in itertools.groupby(group.rows, key=lambda row: row.mixer):
        rows = list(members)
        made = mixer is not None and rows[0].how != "copied"
        if mixer is not None:
            yield mixer, f"{rows[0].how}: {_sources(rows[0])}" if made else rows[0].how, "", "", ""
        for row in rows:
            name = row.name.removesuffix(".weight")
            source = "" if made else _sources(row)
            shape, size = "x".join(map(str, row.info.shape)), f"{row.info.nbytes:,}"
            yield name if mixer is None else f"  {name}", source, shape, row.info.dtype, size


def _sources(row: PlanRow) -> str:
    """Without what is the same for nearly all of them."""
    if row.how == "copied" and row.sources == (row.name,):
        return "the same"
    return " ".join(source.removeprefix("self_attn.").removesuffix(".weight") for source in row.sources)

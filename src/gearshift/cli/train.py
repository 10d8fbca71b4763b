"""``gearshift train``: align, distil or fine-tune the mixers of a supernet, as a recipe says."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from gearshift.train.plan import TrainingPlan

KEPT = (
    "the last checkpoint is in the run directory; run the same command again with --resume to go on from it"
)


def run(
    recipe: Annotated[Path, typer.Argument(help="A YAML recipe.")],
    settings: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            help="Change one value of the recipe: KEY=VALUE, such as stages.0.steps=10. May be repeated.",
        ),
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Say what the run would take, and do nothing.")
    ] = False,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on from the run directory's last good checkpoint.")
    ] = False,
) -> None:
    """Train the mixers of a supernet until each placement comes close to the teacher."""
    from gearshift.train.recipe_file import load_recipe

    read = load_recipe(recipe, settings or [])
    if dry_run:
        from gearshift.train.plan import plan_training

        _print_plan(plan_training(read))
        return
    from gearshift.cli.tables import say_written
    from gearshift.train.distributed import speaks
    from gearshift.train.run import train

    written = train(read, resume=resume)
    if speaks():
        recorded = read.stages[-1].stage == "record"
        what = "the teacher's likeliest tokens" if recorded else "supernet"
        shown = f"gearshift runs show {read.out}" if recorded else f"gearshift info {written}"
        say_written(written, what, next_step=shown)


def _print_plan(plan: TrainingPlan) -> None:
    """Parameters, then a table with a column for each stage."""
    from datetime import timedelta

    from gearshift.cli.tables import print_table

    frozen = plan.parameters - plan.trained
    typer.echo(f"parameters: {plan.parameters:,}; trained {plan.trained:,}, frozen {frozen:,}")
    columns = ("", *(stage.name for stage in plan.stages))
    parts = dict.fromkeys(part for stage in plan.stages for part in stage.memory)
    memory = [(part, *(_gib(stage.memory.get(part)) for stage in plan.stages)) for part in parts]
    rows = [
        ("steps", *(f"{stage.steps:,}" for stage in plan.stages)),
        ("tokens", *(f"{stage.tokens:,}" for stage in plan.stages)),
        ("expected time", *(str(timedelta(seconds=round(stage.seconds))) for stage in plan.stages)),
        *memory,
        ("memory of a GPU", *(_gib(stage.peak) for stage in plan.stages)),
    ]
    print_table(f"plan for {plan.gpus} GPUs of {_gib(plan.memory)}", columns, rows)
    if not plan.fits:
        typer.echo(
            "this does not fit: more GPUs, a smaller batch_size, or scale.activation_checkpointing would help"
        )
    typer.echo("nothing was done")


def _gib(number: int | None) -> str:
    return "" if number is None else f"{number / 2**30:,.2f} GiB"

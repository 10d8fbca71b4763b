"""``gearshift distill``: train the new mixers of a supernet against its own frozen teacher path."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

KEPT = (
    "the last checkpoint is in the run directory; run the same command again with --resume to go on from it"
)


def run(
    recipe: Annotated[Path, typer.Argument(help="A YAML recipe.")],
    settings: Annotated[
        list[str] | None,
        typer.Option("--set", help="Change one value of the recipe: KEY=VALUE. May be repeated."),
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on from the run directory's last checkpoint.")
    ] = False,
) -> None:
    """Train the mixers of a supernet until each placement comes close to the teacher."""
    from gearshift.cli.tables import say_written
    from gearshift.train.distill import distill
    from gearshift.train.recipe import load_recipe

    written = distill(load_recipe(recipe, settings or []), resume=resume)
    say_written(written, "supernet", next_step=f"gearshift info {written}")

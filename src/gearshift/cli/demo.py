"""``gearshift demo``: the whole road on the shipped teacher, in a few minutes on a laptop."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

KEPT = "what the finished steps wrote is in the output folder; run the same command again"


def run(
    out: Annotated[Path, typer.Option(help="The folder for everything the demo writes.")] = Path("runs/demo"),
    teacher: Annotated[
        Path | None, typer.Option(help="A teacher directory; the one shipped in the repository if left out.")
    ] = None,
) -> None:
    """Convert, distil, evaluate, search and answer at three speeds, in one command."""
    from gearshift.demo import run_demo

    run_demo(out, teacher)

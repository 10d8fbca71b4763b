"""The ``gearshift`` command: one file a subcommand, each thin: parse, call, print.

Nothing here imports torch or transformers until a command runs, so that ``--help`` answers at once.
"""

from __future__ import annotations

import os
from typing import Annotated

import typer

import gearshift
from gearshift.cli import (
    bench,
    calibrate,
    convert,
    cost,
    demo,
    evaluate,
    explore,
    export,
    generate,
    info,
    presets,
    runs,
    search,
    serve,
    stability,
    thin,
    train,
)
from gearshift.cli.report import reporting_errors

app = typer.Typer(
    name="gearshift",
    help="One checkpoint, many speeds: turn a pretrained Transformer into a supernet and pick its speed.",
    no_args_is_help=True,
    add_completion=False,
    # An unexpected exception is a bug, and a plain traceback is the best report of it.
    pretty_exceptions_enable=False,
)

_COMMANDS = (
    demo,
    convert,
    calibrate,
    train,
    bench,
    search,
    stability,
    explore,
    generate,
    serve,
    export,
    thin,
    info,
)
for _command in _COMMANDS:
    _name = _command.__name__.rpartition(".")[2]
    app.command(_name)(reporting_errors(_command.run, kept=_command.KEPT))

_GROUPS = {"evaluate": evaluate, "cost": cost, "presets": presets, "runs": runs}
for _name, _group in _GROUPS.items():
    for _part, _function in _group.COMMANDS.items():
        _group.app.command(_part)(reporting_errors(_function, kept=_group.KEPT))
    app.add_typer(_group.app, name=_name)


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"gearshift {gearshift.__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool,
        typer.Option("--version", help="Print the version and exit.", callback=_print_version, is_eager=True),
    ] = False,
) -> None:
    # Transformers draws a bar for every model it loads; the commands show progress where it says something.
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")


def main() -> None:
    """Run the command line and exit."""
    app()

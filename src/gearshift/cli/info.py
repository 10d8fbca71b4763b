"""``gearshift info``: what is in a directory."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from gearshift.inspect_directory import DirectoryError, Report, inspect_directory

KEPT = "nothing is written by this command"


def run(directory: Annotated[Path, typer.Argument(help="A teacher, supernet or run directory.")]) -> None:
    """Say what a directory holds: its kind, parameters, bytes, presets, and what is missing."""
    from gearshift.cli.tables import print_table

    report = inspect_directory(directory)
    typer.echo(f"{report.path}: a {report.kind} directory")
    if report.facts:
        print_table("facts", ("what", "value"), report.facts.items())
    if report.parameters:
        print_table("weights", ("part", "parameters", "bytes"), _weights(report))
    if report.presets:
        print_table("presets", ("preset", "placement", "retention"), _presets(report))
    if report.missing:
        raise DirectoryError(f"{report.path} is not complete; missing: " + "; ".join(report.missing))


def _weights(report: Report) -> list[tuple[str, str, str]]:
    parts = [(part, report.parameters[part], report.bytes[part]) for part in sorted(report.parameters)]
    parts.append(("all", report.parameters.total(), report.bytes.total()))
    return [(part, f"{parameters:,}", f"{size:,}") for part, parameters, size in parts]


def _presets(report: Report) -> list[tuple[str, str, str]]:
    return [
        (name, str(preset.placement), "-" if preset.retention is None else f"{preset.retention:.1%}")
        for name, preset in report.presets.items()
    ]

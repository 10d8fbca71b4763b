"""Small pieces of printing that the commands share."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table


def print_table(title: str, columns: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """Print a table; the first column is left-aligned text, the others are aligned right as numbers."""
    table = Table(title=title, title_justify="left")
    for index, column in enumerate(columns):
        table.add_column(column, justify="left" if index == 0 else "right", overflow="fold")
    for row in rows:
        table.add_row(*row)
    Console().print(table)


def say_written(path: Path, what: str, next_step: str, notes: Iterable[str] = ()) -> None:
    """Say where a command's result is, what is to be known of it, and what can be done with it next."""
    print(f"{what} written to {path}")
    for note in notes:
        print(note)
    print(f"next: {next_step}")

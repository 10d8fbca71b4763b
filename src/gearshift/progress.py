"""How far a long piece of work is: a bar in a terminal, a line every few seconds elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta

from rich.console import Console
from rich.filesize import decimal
from rich.progress import (
    BarColumn,
    DownloadColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)

SECONDS_BETWEEN_LINES = 5.0

# Called with how many items are done and a short note on the latest one.
Report = Callable[[int, str], None]


@contextmanager
def show_progress(
    what: str, total: int, done: int = 0, enabled: bool = True, in_bytes: bool = False
) -> Iterator[Report]:
    """Show the progress of ``total`` items on stderr while the block runs.

    Args:
        what: the work's name.
        total: items in all.
        done: items finished before the block, by an earlier run.
        enabled: false shows nothing.
        in_bytes: items are bytes: they are shown with their unit, and with how many a second come to be.
            Without a terminal, what is done within seconds is not shown at all.
    """
    console = Console(stderr=True)
    if not enabled:
        yield lambda count, note: None
    elif console.is_terminal:
        yield from _bar(console, what, total, done, in_bytes)
    elif in_bytes:
        yield _byte_line_printer(what, total)
    else:
        yield _line_printer(what, total, done)


def _bar(console: Console, what: str, total: int, done: int, in_bytes: bool) -> Iterator[Report]:
    counts: tuple[ProgressColumn, ...] = (MofNCompleteColumn(),)
    if in_bytes:
        counts = (DownloadColumn(), TransferSpeedColumn())
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        *counts,
        TextColumn("{task.fields[note]}"),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console) as bar:
        task = bar.add_task(what, total=total, completed=done, note="")
        yield lambda count, note: bar.update(task, completed=count, note=note)


def _line_printer(what: str, total: int, done: int) -> Report:
    """For logs: a line for the first item, the last, and every few seconds between."""
    started = time.monotonic()
    last = -SECONDS_BETWEEN_LINES

    def report(count: int, note: str) -> None:
        nonlocal last
        elapsed = time.monotonic() - started
        if elapsed - last < SECONDS_BETWEEN_LINES and count < total:
            return
        last = elapsed
        left = _time_left(elapsed, count - done, total - count)
        print(f"{what} {count}/{total}  {note}  {left} left", file=sys.stderr, flush=True)

    return report


def _byte_line_printer(what: str, total: int) -> Report:
    """For logs: a line every few seconds."""
    started = last = time.monotonic()

    def report(count: int, note: str) -> None:
        nonlocal last
        now = time.monotonic()
        if now - last < SECONDS_BETWEEN_LINES:
            return
        last = now
        speed, left = decimal(int(count / (now - started))), _time_left(now - started, count, total - count)
        shown = f"{decimal(count)} of {decimal(total)}, {speed}/s"
        print(f"{what} {shown}  {note}  {left} left", file=sys.stderr, flush=True)

    return report


def _time_left(elapsed: float, done: int, missing: int) -> timedelta:
    return timedelta(seconds=round(elapsed * missing / max(1, done)))

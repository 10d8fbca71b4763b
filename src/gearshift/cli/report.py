"""What a person sees when a command cannot finish: one clear line, and an exit code that is not 0."""

from __future__ import annotations

import errno
import functools
import sys
from collections.abc import Callable
from typing import ParamSpec

import typer

from gearshift.errors import GearshiftError

P = ParamSpec("P")

FAILED = 1
INTERRUPTED = 130  # 128 + SIGINT, as shells count


def reporting_errors(command: Callable[P, None], kept: str) -> Callable[P, None]:
    """Wrap a command so that what a user can mend ends in one line on stderr instead of a traceback.

    Args:
        command: the function behind a subcommand.
        kept: what an interruption leaves on the disk, and how to go on.
    """

    @functools.wraps(command)
    def reported(*args: P.args, **kwargs: P.kwargs) -> None:
        try:
            command(*args, **kwargs)
        except KeyboardInterrupt:
            _say(f"stopped: {kept}")
            raise typer.Exit(INTERRUPTED) from None
        except Exception as error:
            message = _message(error, out=kwargs.get("out"))
            if message is None:
                raise
            _say(f"error: {message}")
            raise typer.Exit(FAILED) from None

    return reported


def _say(line: str) -> None:
    print(line, file=sys.stderr)


def _message(error: Exception, out: object) -> str | None:
    """The line for an error that a user can mend; None for a bug, which keeps its traceback."""
    if isinstance(error, GearshiftError):
        return str(error)
    if _disk_is_full(error):
        where = getattr(error, "filename", None) or out or "the output"
        return (
            f"no space left on the disk while writing {where}; "
            "nothing half-written was left there: free some space and run the same command again"
        )
    if isinstance(error, OSError) and error.errno != errno.EPIPE:
        return f"{error.strerror}: {error.filename}" if error.filename else str(error)
    return None


def _disk_is_full(error: Exception) -> bool:
    """Whether the disk filled up; safetensors has an exception of its own that holds the number as text."""
    if isinstance(error, OSError):
        return error.errno == errno.ENOSPC
    return type(error).__name__ == "SafetensorError" and f"os error {errno.ENOSPC}" in str(error)

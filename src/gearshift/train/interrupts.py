"""Ending a run between two steps when someone asks for it."""

from __future__ import annotations

import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

HELD = (signal.SIGINT, signal.SIGTERM)


@contextmanager
def finishing_steps() -> Iterator[Callable[[], bool]]:
    """Hold the first Ctrl-C, or the first request to terminate, back, so that a step is never cut in two.

    Yields whether there was one. A second one interrupts at once. Outside the main thread, where Python
    delivers no signals, nothing is held.
    """
    asked = False

    def hold(number: int, frame: FrameType | None) -> None:
        nonlocal asked
        if asked:
            raise KeyboardInterrupt
        asked = True
        print("stopping after this step; Ctrl-C again stops at once", file=sys.stderr, flush=True)

    if threading.current_thread() is not threading.main_thread():
        yield lambda: False
        return
    before = {number: signal.signal(number, hold) for number in HELD}
    try:
        yield lambda: asked
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)

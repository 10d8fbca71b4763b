"""Which placements share the next step."""

from __future__ import annotations

from collections.abc import Hashable, Iterable
from typing import TypeVar

KeyT = TypeVar("KeyT", bound=Hashable)


class TurnPolicy:
    """At most so many placements a step; those that have waited longest come first, so none starves.

    With P placements that want to run and a limit of M, each one runs in at least one of any ceil(P / M)
    steps in a row.

    Args:
        limit: how many; 0 for any number.
    """

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self._last_turn: dict[Hashable, int] = {}
        self._step = 0

    def choose(self, wanting: Iterable[KeyT]) -> set[KeyT] | None:
        """The placements whose turn it is, of those that want to run, given in order of arrival.

        Returns:
            None if all may run.
        """
        candidates = list(dict.fromkeys(wanting))
        self._step += 1
        if self.limit == 0 or len(candidates) <= self.limit:
            chosen = set(candidates)
        else:
            ordered = sorted(candidates, key=lambda key: self._last_turn.get(key, 0))
            chosen = set(ordered[: self.limit])
        # Those that want nothing now are forgotten: when they come back they have waited for nothing.
        self._last_turn = {
            key: self._step if key in chosen else self._last_turn.get(key, 0) for key in candidates
        }
        return None if len(chosen) == len(candidates) else chosen

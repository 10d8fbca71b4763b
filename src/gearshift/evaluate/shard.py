"""A part of the placements, for one of several machines or GPUs. No torch."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from gearshift.errors import GearshiftError
from gearshift.placement import Placement


class ShardError(GearshiftError, ValueError):
    """A shard is not written as it should be."""


@dataclass(frozen=True)
class Shard:
    """Part number ``index`` of ``count`` parts, counted from 1."""

    index: int = 1
    count: int = 1

    @classmethod
    def parse(cls, text: str) -> Shard:
        """Read ``2/4``.

        Raises:
            ShardError: it is not so written, or there is no such part.
        """
        match = re.fullmatch(r"([0-9]{1,6})/([0-9]{1,6})", text.strip())
        index, count = map(int, match.groups()) if match else (0, 0)
        if not 1 <= index <= count:
            raise ShardError(f"the shard {text!r}; expected a part of some, such as 1/4, 2/4, 3/4 or 4/4")
        return cls(index, count)

    def part(self, placements: Sequence[Placement]) -> list[Placement]:
        """Its part, in the order given; neighbours stay together, and all parts are as long as can be."""
        size = len(placements)
        return list(placements[size * (self.index - 1) // self.count : size * self.index // self.count])

"""What an engine keeps in memory for a placement: the bytes of caches as it allocates them, and of weights.

Measured rows carry this description, so that a cost model needs no supernet and no engine beside it.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from gearshift._checks import check_keys, is_count
from gearshift.errors import GearshiftError
from gearshift.placement import Placement, PlacementSpace
from gearshift.search.space import Array
from gearshift.slot_layout import KINDS, Kind, KindLayout, SlotLayout


class CostError(GearshiftError, ValueError):
    """Measurements that no cost model can be fitted to, a prediction they do not allow, or a damaged file."""


@dataclass(frozen=True)
class MixerMemory:
    """What one mixer of one layer keeps.

    Attributes:
        kind: ``full`` keeps every token, ``window`` the latest ones, ``state`` the same at any length.
        cache_bytes: of one token, or of the whole state.
        weight_bytes: of its weights.
        window: tokens that a window holds; None for the other kinds.
    """

    kind: Kind
    cache_bytes: int
    weight_bytes: int
    window: int | None = None

    def __post_init__(self) -> None:
        sizes = (self.cache_bytes, self.weight_bytes)
        window_fits = is_count(self.window, 1) if self.kind == "window" else self.window is None
        if self.kind not in KINDS or not all(is_count(size, 0) for size in sizes) or not window_fits:
            raise CostError(
                f"the memory of a mixer is {asdict(self)}; expected a kind of {', '.join(KINDS)}, whole "
                "numbers of bytes, and a window for the kind window only"
            )

    def tokens_read(self, context: int) -> int:
        """Cached tokens that a decode step reads; a state counts none, since it never grows."""
        if self.kind == "state":
            return 0
        return context if self.window is None else min(self.window, context)

    def pairs_read(self, tokens: int) -> int:
        """Pairs of tokens that a prompt of this length attends over: the sum of `tokens_read` over it."""
        if self.kind == "state":
            return 0
        full = min(tokens, tokens if self.window is None else self.window)
        return full * (full + 1) // 2 + (tokens - full) * full

    def sequence_bytes(self, context: int) -> int:
        """Bytes of a sequence's cache, nothing padded."""
        return self.cache_bytes * (1 if self.kind == "state" else self.tokens_read(context))


@dataclass(frozen=True)
class Engine:
    """The engine that was measured, as far as memory goes.

    Attributes:
        name: for messages.
        shared_weight_bytes: weights of all that is no mixer.
        layers: for each layer the mixers that it holds, by long name.
        slots: how cache memory is cut into pages; None where caches are as large as what they hold.
        in_flight: tokens scheduled but not finished, beyond which pages of a window are not given back.
    """

    name: str
    shared_weight_bytes: int
    layers: tuple[Mapping[str, MixerMemory], ...]
    slots: SlotLayout | None = None
    in_flight: int = 1

    @property
    def space(self) -> PlacementSpace:
        """The placements that it can run."""
        held = tuple(tuple(layer) for layer in self.layers)
        return PlacementSpace(len(held), tuple(dict.fromkeys(itertools.chain(*held))), held)

    def sequence_bytes(self, placement: Placement, context: int) -> int:
        """Bytes that a sequence of so many tokens holds, padded as the engine pads."""
        used = [layer[mixer] for layer, mixer in zip(self.layers, placement, strict=True)]
        if self.slots is None:
            return sum(memory.sequence_bytes(context) for memory in used)
        counts: list[tuple[Kind, int]] = [
            (kind, sum(memory.kind == kind for memory in used)) for kind in KINDS
        ]
        blocks = sum(
            self.slots.blocks(kind, count, context, self.in_flight) for kind, count in counts if count
        )
        return blocks * self.slots.block_bytes

    def layer_bytes(self, space: PlacementSpace, context: int) -> Array:
        """Bytes (num_layers, mixers) that each mixer adds, in the space's order; 0 for mixers not held.

        Pages are counted whole. Blocks of pages are not: what a placement's last blocks leave empty depends
        on all of its layers together, and is in `sequence_bytes` only.
        """
        rows = [
            [self._page_bytes(layer[mixer], context) if mixer in layer else 0 for mixer in space.mixers]
            for layer in self.layers
        ]
        return np.array(rows, dtype=np.float64)

    def _page_bytes(self, memory: MixerMemory, context: int) -> float:
        if self.slots is None:
            return memory.sequence_bytes(context)
        page, block = self.slots.block_bytes / self.slots[memory.kind].slots, self.slots.block_tokens
        if memory.kind == "state":
            return page
        pages = math.ceil(context / block)
        if memory.kind == "window":
            held = min(self.slots.window - 1 + self.in_flight, context)
            pages = min(pages, math.ceil(held / block) + 1)
        return page * pages

    def largest_batch(self, placement: Placement, context: int, memory_bytes: int) -> int:
        """Sequences of so many tokens whose caches fit into the memory.

        Raises:
            CostError: not even one fits.
        """
        each = self.sequence_bytes(placement, context)
        if each > memory_bytes:
            raise CostError(
                f"a sequence of {context} tokens of {placement} holds {each:,} bytes of cache; the memory "
                f"for caches is {memory_bytes:,}: give more of it, or a shorter context"
            )
        return memory_bytes // max(each, 1)

    def weight_bytes(self, placements: Iterable[Placement] | None = None) -> int:
        """Weights of a model that holds what these placements use; without any, of all mixers."""
        wanted = None if placements is None else list(placements)
        mixers = sum(
            memory.weight_bytes
            for number, layer in enumerate(self.layers)
            for name, memory in layer.items()
            if wanted is None or any(placement[number] == name for placement in wanted)
        )
        return self.shared_weight_bytes + mixers

    def to_json(self) -> dict[str, Any]:
        """The JSON form; equal neighbouring layers are written once, with their number."""
        layers = [{name: asdict(memory) for name, memory in layer.items()} for layer in self.layers]
        runs = [[len(list(run)), layer] for layer, run in itertools.groupby(layers)]
        slots = None if self.slots is None else _slots_to_json(self.slots)
        return {**vars(self), "layers": runs, "slots": slots}

    @classmethod
    def from_json(cls, given: object) -> Engine:
        """Read the JSON form.

        Raises:
            CostError: it is none.
        """
        values = dict(check_keys(cls, given, "the engine", CostError))
        try:
            values["layers"] = tuple(
                layer for count, run in values["layers"] for layer in [_layer_from_json(run)] * count
            )
            slots = values.get("slots")
            values["slots"] = None if slots is None else _slots_from_json(slots)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise CostError(f"the engine's description is damaged: {error!r}") from None
        return cls(**values)


def _layer_from_json(given: Mapping[str, Any]) -> dict[str, MixerMemory]:
    return {
        name: MixerMemory(**check_keys(MixerMemory, memory, f"the memory of {name}", CostError))
        for name, memory in given.items()
    }


def _slots_to_json(slots: SlotLayout) -> dict[str, Any]:
    return {**asdict(slots), "kinds": {kind: asdict(cut) for kind, cut in slots.kinds}}


def _slots_from_json(given: Mapping[str, Any]) -> SlotLayout:
    kinds: Sequence[tuple[Kind, KindLayout]] = [
        (kind, KindLayout(**given["kinds"][kind])) for kind in KINDS if kind in given["kinds"]
    ]
    return SlotLayout(**{**given, "kinds": tuple(kinds)})

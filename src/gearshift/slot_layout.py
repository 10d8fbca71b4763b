"""How cache memory is cut: anonymous page slots on super-pages, and which of them a placement uses.

A block of vLLM's cache manager is a *super-page* of fixed size. It is cut into equal *slots*, each one page
of one layer: the keys and values of ``block_tokens`` tokens, or one recurrent state. A cache group owns
blocks of one *kind* and belongs to no layer: a request's placement says how many layers of a kind it has, and
these layers take the slots of as many groups as they need. So any placement can be served, and a request
holds memory only for the mixers that it uses.

Where fewer layers than slots are left for a group, the group is *folded*: with 12 slots and 3 layers, one
super-page holds four pages in a row of each layer, and nothing is wasted. Counts that do not divide the slots
are split into pieces that do: 7 layers of 12 slots are 6 + 1. A request's first token in a folded block makes
it hold the whole block, so a fold costs at most one super-page at the end.

Plain data: no torch, no vLLM. Letters: L layers.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

Kind = Literal["full", "window", "state"]
KINDS: tuple[Kind, ...] = ("full", "window", "state")

# Pages begin at multiples of this, so that kernels may load vectors of any element type.
PAGE_ALIGNMENT = 16
# How much a super-page may grow for one more state.
_GROWTH = 1 / 16


@dataclass(frozen=True)
class Demand:
    """What the layers of a model ask of one kind of cache.

    Attributes:
        page_bytes: size of the largest page.
        layers: how many layers hold a mixer of this kind, and so could use it at once.
    """

    page_bytes: int
    layers: int


@dataclass(frozen=True)
class KindLayout:
    """How blocks of one kind are cut.

    Attributes:
        slots: pages on a super-page.
        page_bytes: distance from a page to the next.
        groups: cache groups that the most demanding placement needs.
    """

    slots: int
    page_bytes: int
    groups: int


@dataclass(frozen=True)
class Seat:
    """Where the pages of one layer of a request are.

    The page of the layer's token block ``t`` is number ``block * slots + (t % fold) * stride + offset`` of
    the pool, ``block`` being entry ``t // fold`` of the request's table in this group.

    Attributes:
        kind: of cache.
        group: index among the groups of the kind.
        offset: the layer's place among those that share the group.
        stride: how many layers share the group.
        fold: token blocks of one layer on a super-page.
    """

    kind: Kind
    group: int
    offset: int
    stride: int
    fold: int


@dataclass(frozen=True)
class Share:
    """One group that a request needs, and how many tokens one of its blocks covers there."""

    kind: Kind
    group: int
    block_tokens: int


@dataclass(frozen=True)
class SlotLayout:
    """The cut of all kinds of cache of a model; hashable, since cache specs carry it.

    Attributes:
        block_tokens: tokens of an attention page.
        block_bytes: size of a super-page.
        window: tokens that the widest window sees; 0 without windows.
        layers: layers of the model.
        kinds: the kinds that the model has, in the order of `KINDS`, each with its cut.
    """

    block_tokens: int
    block_bytes: int
    window: int
    layers: int
    kinds: tuple[tuple[Kind, KindLayout], ...]

    @classmethod
    def plan(
        cls, demands: Mapping[Kind, Demand], *, layers: int, block_tokens: int, slots: int, window: int
    ) -> SlotLayout:
        """Cut super-pages of ``slots`` attention pages, or of states where those are larger."""
        attention = slots * max(
            (demands[k].page_bytes for k in ("full", "window") if k in demands), default=0
        )
        state = demands["state"].page_bytes if "state" in demands else 0
        states = _states_on(attention, state) if state else 0
        wanted = max(attention, states * state)
        counts = {kind: states if kind == "state" else slots for kind in demands}
        # Pages of every kind are equally spaced over the block; the spec of a block counts it in tokens.
        unit = math.lcm(2 * block_tokens, *(PAGE_ALIGNMENT * count for count in counts.values()))
        block_bytes = math.ceil(wanted / unit) * unit
        kinds: tuple[tuple[Kind, KindLayout], ...] = tuple(
            (kind, KindLayout(counts[kind], block_bytes // counts[kind], _groups(kind, counts[kind], demand)))
            for kind, demand in sorted(demands.items(), key=lambda item: KINDS.index(item[0]))
        )
        return cls(block_tokens, block_bytes, window, layers, kinds)

    def __getitem__(self, kind: Kind) -> KindLayout:
        return dict(self.kinds)[kind]

    def group_names(self) -> list[tuple[Kind, int]]:
        """Every group: its kind, and its index within the kind."""
        return [(kind, index) for kind, cut in self.kinds for index in range(cut.groups)]

    def seats(self, kinds: Sequence[Kind]) -> tuple[Seat, ...]:
        """The seat of each layer, given the kind of cache that each layer's mixer needs."""
        free = {kind: iter(self._kind_seats(kind, kinds.count(kind))) for kind in set(kinds)}
        return tuple(next(free[kind]) for kind in kinds)

    def shares(self, kinds: Sequence[Kind]) -> tuple[Share, ...]:
        """The groups that these layers need, in the order of `group_names`."""
        found = {(KINDS.index(s.kind), s.group): s for s in self.seats(kinds)}
        return tuple(
            Share(seat.kind, seat.group, self.block_tokens * seat.fold) for _, seat in sorted(found.items())
        )

    def _kind_seats(self, kind: Kind, count: int) -> list[Seat]:
        slots = self[kind].slots
        sizes = pieces(count, slots) if kind != "state" else _filled(count, slots)
        return [
            Seat(kind, group, offset, size, 1 if kind == "state" else slots // size)
            for group, size in enumerate(sizes)
            for offset in range(size)
        ]

    def blocks(self, kind: Kind, count: int, tokens: int, in_flight: int) -> int:
        """The most blocks that ``count`` layers of a kind ever hold for a request of so many tokens.

        Args:
            kind: of cache.
            count: layers.
            tokens: length of the request.
            in_flight: tokens that are scheduled but not finished, beyond which a window is not evicted.
        """
        if kind == "state":
            return math.ceil(count / self[kind].slots)
        total = 0
        for size in pieces(count, self[kind].slots):
            covered = self.block_tokens * (self[kind].slots // size)
            needed = math.ceil(tokens / covered)
            if kind == "window":
                needed = min(needed, math.ceil(min(self.window - 1 + in_flight, tokens) / covered) + 1)
            total += needed
        return total

    @functools.cache  # noqa: B019 - there is one layout in a process
    def worst_case_blocks(self, tokens: int, in_flight: int) -> int:
        """The most blocks that a request of so many tokens holds under any placement."""
        names: list[Kind] = [kind for kind, _ in self.kinds]
        return max(
            sum(self.blocks(kind, n, tokens, in_flight) for kind, n in zip(names, counts, strict=True))
            for counts in itertools.product(range(self.layers + 1), repeat=len(names))
            if sum(counts) == self.layers
        )


def pieces(count: int, slots: int) -> tuple[int, ...]:
    """Split ``count`` layers into divisors of ``slots``, the largest first: 7 of 12 -> (6, 1)."""
    sizes: list[int] = []
    for size in range(slots, 0, -1):
        if slots % size == 0:
            sizes += [size] * (count // size)
            count %= size
    return tuple(sizes)


def _states_on(attention: int, state: int) -> int:
    """States on a super-page: what fits beside so many bytes of attention pages, or one more.

    One more makes the super-page larger than its attention pages need; that must cost them little.
    """
    fitting = attention // state
    grows_little = (fitting + 1) * state <= attention * (1 + _GROWTH)
    return fitting + 1 if grows_little or not fitting else fitting


def _filled(count: int, slots: int) -> list[int]:
    """States have no tokens to fold over: full groups and a rest."""
    return [slots] * (count // slots) + [count % slots] * (count % slots > 0)


def _groups(kind: Kind, slots: int, demand: Demand) -> int:
    """Groups that any number of layers up to the demand can be split into."""
    if kind == "state":
        return math.ceil(demand.layers / slots)
    return max(len(pieces(count, slots)) for count in range(1, demand.layers + 1))

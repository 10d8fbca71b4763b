"""Partial placements of the dynamic program, and which of them no other beats."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gearshift.search.space import Array

Integers = NDArray[np.int64]
# int64 where every sum of costs fits, else Python's integers.
ExactCosts = NDArray[Any]


@dataclass(frozen=True, eq=False)
class Labels:
    """Partial placements that end in the same mixers, by rising cost.

    Attributes:
        costs: (n,) in units of which every layer cost is a multiple.
        values: (n,).
        used: (n,) of what is limited; minus infinity where nothing that follows can exceed the limit.
        mixers: (n,) mixer of the last layer.
        origins: (n,) the partial placement without that layer: its row among all labels before it.
    """

    costs: ExactCosts
    values: Array
    used: Array
    mixers: NDArray[np.uint8]
    origins: NDArray[np.int32]

    def __len__(self) -> int:
        return len(self.costs)

    def at(self, rows: NDArray[Any]) -> Labels:
        """Some of the labels."""
        return Labels(
            self.costs[rows], self.values[rows], self.used[rows], self.mixers[rows], self.origins[rows]
        )


def joined(labels: Iterable[Labels]) -> Labels:
    """All of them, one behind the other."""
    parts = list(labels)
    return Labels(
        np.concatenate([part.costs for part in parts]),
        np.concatenate([part.values for part in parts]),
        np.concatenate([part.used for part in parts]),
        np.concatenate([part.mixers for part in parts]),
        np.concatenate([part.origins for part in parts]),
    )


def undominated(labels: Sequence[Labels], count: int = 1) -> Labels:
    """Join labels and keep those that fewer than ``count`` others beat; some more may stay.

    A label beats another if it is no worse in cost, value and use; of equal ones the first beats the rest.
    With ``count`` above 1 the undominated labels are taken away ``count`` times over: a label in none of
    these layers is beaten by one of each.
    """
    everything = joined(labels)
    limited = everything.used.min() < everything.used.max()
    order, beaten = (_order_of_three, _beaten_in_three) if limited else (_order_of_two, _beaten_in_two)
    rest = everything.at(order(everything))
    layers = []
    for _ in range(count):
        lost = beaten(rest)
        layers.append(rest.at(~lost))
        rest = rest.at(lost)
        if not len(rest):
            break
    return layers[0] if len(layers) == 1 else _by_cost(joined(layers))


def _by_cost(labels: Labels) -> Labels:
    return labels.at(_order_of_two(labels))


def _order_of_two(labels: Labels) -> NDArray[np.intp]:
    # Each part is sorted already, and the stable sort is a merge sort that makes use of sorted runs.
    return np.argsort(labels.costs, kind="stable")


def _beaten_in_two(labels: Labels) -> NDArray[np.bool_]:
    """Which of labels by rising cost are beaten in cost and value."""
    best = np.maximum.accumulate(labels.values)
    kept = np.flatnonzero(np.concatenate([[True], labels.values[1:] > best[:-1]]))
    # What is left rises in value, so that the last of several rows of one cost is the best of them.
    costs = labels.costs[kept]
    kept = kept[np.concatenate([costs[1:] != costs[:-1], [True]])]
    beaten = np.ones(len(labels), np.bool_)
    beaten[kept] = False
    return beaten


def _order_of_three(labels: Labels) -> NDArray[np.intp]:
    """By cost, then use, then falling value: what beats a label comes before it."""
    return np.lexsort((-labels.values, labels.used, _ranks(labels.costs)))


def _ranks(numbers: NDArray[Any]) -> Integers:
    """The numbers' places among their distinct values, from 0."""
    return np.unique(numbers, return_inverse=True)[1].astype(np.int64)


def _beaten_in_three(labels: Labels) -> NDArray[np.bool_]:
    """Which of labels in the order of three are beaten in cost, use and value.

    By bisection, all blocks of one size at once: what beats a label and stands in the left half of its block
    has a lower or equal cost by the order, so that only use and value are left to compare, and these by a
    running maximum. Every pair of labels is in different halves of exactly one block.
    """
    count = len(labels)
    used, values = _ranks(labels.used), _ranks(labels.values) + 1
    beaten = np.zeros(count, np.bool_)
    position = np.arange(count)
    half = 1
    while half < count:
        block, right = position // (2 * half), (position // half) % 2 == 1
        order = np.argsort((block * count + used) * 2 + right)
        # Blocks follow one another in this order, and this makes the maximum start anew with each.
        floor = block[order] * (count + 1)
        best = np.maximum.accumulate(np.where(right[order], 0, values[order]) + floor) - floor
        beaten[order] |= right[order] & (best >= values[order])
        half *= 2
    return beaten

"""Scores of placements that are sums over clusters of near layers: what the optimisers maximise."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from gearshift.placement import Placement, PlacementSpace

Array = NDArray[np.float64]

# A cluster of layers i + o for each o of the offsets; they rise, and the first is 0.
Offsets = tuple[int, ...]

SINGLE: Offsets = (0,)


@dataclass(frozen=True)
class AdditiveScore:
    """A score of placements that is a sum over clusters of layers, and so can be maximised exactly.

    score(m) = constant + sum over offsets o, layers i of terms[o][i, m_i, m_{i+o_1}, m_{i+o_2}, ...]

    Attributes:
        space: the placements; mixers are indexed in its order.
        constant: added to every score.
        terms: for each cluster's offsets an array (num_layers - last offset, mixers, mixers, ...), with one
            axis of mixers for each layer of the cluster. What stands at mixers that a layer does not hold has
            no effect.
    """

    space: PlacementSpace
    constant: float
    terms: Mapping[Offsets, Array]

    def __post_init__(self) -> None:
        length, mixers = self.space.num_layers, len(self.space.mixers)
        for offsets, term in self.terms.items():
            assert offsets[0] == 0 and list(offsets) == sorted(set(offsets))
            assert term.shape == (length - offsets[-1], *(mixers,) * len(offsets))

    @classmethod
    def of_layers(cls, space: PlacementSpace, layers: Array, constant: float = 0.0) -> AdditiveScore:
        """A score in which layers do not interact, from an array (num_layers, mixers)."""
        return cls(space, constant, {SINGLE: layers})

    @property
    def reach(self) -> int:
        """The distance up to which layers interact."""
        return max((offsets[-1] for offsets in self.terms), default=0)

    def values(self, placements: Sequence[Placement]) -> Array:
        """Scores (n,) of the placements.

        Raises:
            PlacementError: a placement does not lie in the space.
        """
        return self.values_of(mixer_indices(self.space, placements))

    def values_of(self, chosen: NDArray[np.int64]) -> Array:
        """Scores (n,) of placements given as indices of mixers (n, num_layers)."""
        total = np.full(len(chosen), self.constant)
        for offsets, term in self.terms.items():
            first = np.arange(len(term))
            total += term[first, *(chosen[:, first + offset] for offset in offsets)].sum(axis=1)
        return total

    def gains(self, layer: int) -> Array:
        """What the clusters that end at ``layer`` add.

        An array with one axis of mixers for each of the layers from ``layer - reach``, or from 0, to
        ``layer``.
        """
        axes = min(layer, self.reach) + 1
        total = np.zeros((len(self.space.mixers),) * axes)
        for offsets, term in self.terms.items():
            first = layer - offsets[-1]
            if first >= 0:
                own = {axes - 1 - (offsets[-1] - offset) for offset in offsets}
                shape = [total.shape[axis] if axis in own else 1 for axis in range(axes)]
                total += term[first].reshape(shape)
        return total


def mixer_indices(space: PlacementSpace, placements: Sequence[Placement]) -> NDArray[np.int64]:
    """Mixers as indices into ``space.mixers``: (n, num_layers).

    Raises:
        PlacementError: a placement does not lie in the space.
    """
    index = {mixer: number for number, mixer in enumerate(space.mixers)}
    rows = [[index[mixer] for mixer in space.check(placement)] for placement in placements]
    return np.array(rows, dtype=np.int64).reshape(len(placements), space.num_layers)


def placement_of(space: PlacementSpace, chosen: Sequence[int]) -> Placement:
    """The placement with these indices of mixers, one for each layer."""
    return Placement(tuple(space.mixers[mixer] for mixer in chosen))

"""Features of a placement, and scores that are sums over layers and pairs of layers.

The features follow cluster expansion: which mixer a layer has (order 1), and which two mixers a pair of
layers up to `interaction_range` apart has (order 2), all against full attention, so that all-FA has no
feature set.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from gearshift.placement import FULL_ATTENTION, Placement, PlacementSpace

Array = NDArray[np.float64]


@dataclass(frozen=True)
class AdditiveScore:
    """A score of placements that the dynamic program maximises exactly.

    score(m) = constant + sum_i layers[i, m_i] + sum_d sum_i pairs[d-1][i, m_i, m_{i+d}].

    Attributes:
        space: the placements; mixers are indexed in its order.
        constant: added to every score.
        layers: (num_layers, mixers); what stands at a mixer that the layer does not hold has no effect.
        pairs: for each distance d = 1, 2, ... an array (num_layers - d, mixers, mixers).
    """

    space: PlacementSpace
    constant: float
    layers: Array
    pairs: tuple[Array, ...] = ()

    def __post_init__(self) -> None:
        length, mixers = self.space.num_layers, len(self.space.mixers)
        assert self.layers.shape == (length, mixers)
        assert [pair.shape for pair in self.pairs] == [
            (length - distance, mixers, mixers) for distance in range(1, len(self.pairs) + 1)
        ]

    def values(self, placements: Sequence[Placement]) -> Array:
        """Scores (n,) of the placements."""
        chosen = mixer_indices(self.space, placements)
        total = self.constant + self.layers[np.arange(self.space.num_layers), chosen].sum(axis=1)
        for distance, pair in enumerate(self.pairs, start=1):
            total = total + pair[np.arange(len(pair)), chosen[:, :-distance], chosen[:, distance:]].sum(
                axis=1
            )
        return total


def mixer_indices(space: PlacementSpace, placements: Sequence[Placement]) -> NDArray[np.int64]:
    """Mixers as indices into ``space.mixers``: (n, num_layers).

    Raises:
        PlacementError: a placement does not lie in the space.
    """
    index = {mixer: number for number, mixer in enumerate(space.mixers)}
    rows = [[index[mixer] for mixer in space.check(placement)] for placement in placements]
    return np.array(rows, dtype=np.int64).reshape(len(placements), space.num_layers)


@dataclass(frozen=True)
class FeatureGroup:
    """Features that share one prior scale: ``"mixer"``, ``"layer"``, ``"mixer pair"`` or ``"layer pair"``."""

    name: str
    columns: slice


class FeatureSpace:
    """The features of a placement.

    Besides one feature per layer and mixer there is one per mixer, the number of layers that have it, and
    likewise for pairs. They add nothing that a sum over layers cannot say, but they let few evaluated
    placements settle what a mixer costs on average; the features per layer then hold the deviations from it.

    Args:
        space: the placements.
        interaction_range: pairs of layers up to this distance get features; 0 for none.
    """

    def __init__(self, space: PlacementSpace, interaction_range: int = 0) -> None:
        assert interaction_range >= 0
        self.space = space
        self.interaction_range = min(interaction_range, space.num_layers - 1)
        reference = FULL_ATTENTION if FULL_ATTENTION in space.mixers else space.mixers[0]
        self.others = [number for number, mixer in enumerate(space.mixers) if mixer != reference]
        self.groups = self._lay_out()
        self.size = self.groups[-1].columns.stop

    def _lay_out(self) -> tuple[FeatureGroup, ...]:
        others, length = len(self.others), self.space.num_layers
        sizes = [("mixer", others), ("layer", others * length)]
        for distance in range(1, self.interaction_range + 1):
            sizes += [("mixer pair", others**2), ("layer pair", others**2 * (length - distance))]
        ends = np.cumsum([size for _, size in sizes]).tolist()
        return tuple(
            FeatureGroup(name, slice(end - size, end)) for (name, size), end in zip(sizes, ends, strict=True)
        )

    def features(self, placements: Sequence[Placement]) -> Array:
        """Feature matrix (n, size).

        Raises:
            PlacementError: a placement does not lie in the space.
        """
        chosen = mixer_indices(self.space, placements)
        layer = (chosen[:, :, None] == np.array(self.others, dtype=np.int64)).astype(np.float64)
        blocks = [layer]
        for distance in range(1, self.interaction_range + 1):
            pair = layer[:, :-distance, :, None] * layer[:, distance:, None, :]
            blocks.append(pair.reshape(*pair.shape[:2], len(self.others) ** 2))
        return np.concatenate(
            [part for block in blocks for part in (block.sum(axis=1), block.reshape(len(block), -1))], axis=1
        )

    def score(self, constant: float, weights: Array) -> AdditiveScore:
        """The score ``constant + features @ weights`` as sums over layers and pairs.

        Args:
            constant: the score of all-FA.
            weights: (size,).
        """
        assert weights.shape == (self.size,)
        length, others, mixers = self.space.num_layers, len(self.others), len(self.space.mixers)
        parts = [weights[group.columns] for group in self.groups]
        layers = np.zeros((length, mixers))
        layers[:, self.others] = parts[0] + parts[1].reshape(length, others)
        pairs = []
        for distance in range(1, self.interaction_range + 1):
            pair = np.zeros((length - distance, mixers, mixers))
            local = parts[2 * distance + 1].reshape(length - distance, others, others)
            pair[:, np.array(self.others)[:, None], self.others] = (
                parts[2 * distance].reshape(others, others) + local
            )
            pairs.append(pair)
        return AdditiveScore(self.space, constant, layers, tuple(pairs))

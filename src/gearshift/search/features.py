"""Features of a placement, as cluster expansion has them, and the kernels that a regression on them needs.

A cluster is a few layers near each other. Its features say which mixers it has, with full attention as the
reference: a cluster with full attention in any of its layers has no feature set, so that all-FA has none at
    all.
For each shape of cluster there are two groups of features: how often each combination of mixers occurs
anywhere ("by kind"), and where it occurs ("by layer"). The first adds nothing that the second cannot say, but
lets few evaluated placements settle what a combination costs on average; the second then holds the deviations
from it.

With n placements only the n x n matrices of products of features are made: 48 layers of four mixers have some
10,000 features at range 3.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from gearshift.placement import FULL_ATTENTION, PlacementSpace
from gearshift.search.space import SINGLE, AdditiveScore, Array, Offsets

Indices = NDArray[np.int64]

# Rows of a kernel made at a time; what is held for them takes layers x rows x columns bytes.
_ROWS_AT_A_TIME = 256


@dataclass(frozen=True, order=True)
class FeatureGroup:
    """Features that share one prior scale.

    Attributes:
        offsets: the layers of a cluster, relative to its first one.
        by_layer: whether each place has features of its own.
    """

    offsets: Offsets
    by_layer: bool

    @property
    def name(self) -> str:
        """Such as ``0-1 by kind``: for files and messages."""
        return f"{'-'.join(map(str, self.offsets))} by {'layer' if self.by_layer else 'kind'}"

    @property
    def order(self) -> int:
        """Layers of a cluster."""
        return len(self.offsets)


class FeatureSpace:
    """The features of a placement.

    Args:
        space: the placements.
        order: the most layers that interact with one another.
        interaction_range: how far apart the first and the last of them may be; 0 for none.
    """

    def __init__(self, space: PlacementSpace, order: int = 1, interaction_range: int = 0) -> None:
        assert order >= 1 and interaction_range >= 0
        self.space = space
        self.interaction_range = min(interaction_range, space.num_layers - 1) if order > 1 else 0
        self.order = min(order, self.interaction_range + 1)
        reference = FULL_ATTENTION if FULL_ATTENTION in space.mixers else space.mixers[0]
        self.reference = space.mixers.index(reference)
        self.groups = tuple(
            FeatureGroup(offsets, by_layer) for offsets in self._clusters() for by_layer in (False, True)
        )

    def _clusters(self) -> Iterator[Offsets]:
        for order in range(1, self.order + 1):
            for others in itertools.combinations(range(1, self.interaction_range + 1), order - 1):
                yield (*SINGLE, *others)

    def kernels(self, one: Indices, other: Indices) -> dict[FeatureGroup, Array]:
        """For each group the products of features (n, m) of placements (n, layers) and (m, layers)."""
        found = {group: np.empty((len(one), len(other))) for group in self.groups}
        for start in range(0, len(one), _ROWS_AT_A_TIME):
            rows = slice(start, start + _ROWS_AT_A_TIME)
            for offsets, products in self._local_kernels(one[rows], other):
                found[FeatureGroup(offsets, True)][rows] = products
        for group in self.groups:
            if not group.by_layer:
                found[group] = self._counts(one, group.offsets) @ self._counts(other, group.offsets).T
        return found

    def _local_kernels(self, one: Indices, other: Indices) -> Iterator[tuple[Offsets, NDArray[np.int16]]]:
        """In how many places two placements have the same set feature, for each shape of cluster."""
        alike = (one.T[:, :, None] == other.T[:, None, :]) & (one.T[:, :, None] != self.reference)
        for offsets in self._clusters():
            places = len(alike) - offsets[-1]
            both = alike[:places]
            for offset in offsets[1:]:
                both = both & alike[offset : offset + places]
            yield offsets, both.sum(axis=0, dtype=np.int16)

    def diagonals(self, chosen: Indices) -> dict[FeatureGroup, Array]:
        """For each group the products (n,) of each placement's features with themselves."""
        return {
            group: self._set_clusters(chosen, group.offsets).sum(axis=1).astype(np.float64)
            if group.by_layer
            else np.square(self._counts(chosen, group.offsets)).sum(axis=1)
            for group in self.groups
        }

    def _set_clusters(self, chosen: Indices, offsets: Offsets) -> NDArray[np.bool_]:
        """Where (n, places) a cluster has no layer of the reference."""
        places = chosen.shape[1] - offsets[-1]
        parts = [chosen[:, offset : offset + places] != self.reference for offset in offsets]
        return np.logical_and.reduce(parts)

    def _kinds(self, chosen: Indices, offsets: Offsets) -> Indices:
        """The combination of mixers (n, places) of each cluster as one number in base `mixers`."""
        places, mixers = chosen.shape[1] - offsets[-1], len(self.space.mixers)
        kinds = np.zeros((len(chosen), places), np.int64)
        for offset in offsets:
            kinds = kinds * mixers + chosen[:, offset : offset + places]
        return kinds

    def _counts(self, chosen: Indices, offsets: Offsets) -> Array:
        """How often (n, kinds) each combination of mixers occurs; those with the reference have 0."""
        size = len(self.space.mixers) ** len(offsets)
        kinds = self._kinds(chosen, offsets) + size * np.arange(len(chosen))[:, None]
        kept = kinds[self._set_clusters(chosen, offsets)]
        return np.bincount(kept, minlength=size * len(chosen)).reshape(len(chosen), size).astype(np.float64)

    def score(
        self, constant: float, variances: Mapping[FeatureGroup, float], chosen: Indices, dual: Array
    ) -> AdditiveScore:
        """The score whose weights are, in each group, variance times (features of ``chosen``).T @ ``dual``.

        Args:
            constant: the score of all-FA.
            variances: prior variance of a weight, by group.
            chosen: placements (n, layers).
            dual: (n,).
        """
        weights = {group: self._weights(group, chosen, dual, variances[group]) for group in self.groups}
        return self.score_of_weights(constant, weights)

    def _weights(self, group: FeatureGroup, chosen: Indices, dual: Array, variance: float) -> Array:
        shape = self._shape(group)
        places, kinds = shape[0], int(np.prod(shape[1:]))
        numbers = self._kinds(chosen, group.offsets)
        if group.by_layer:
            numbers = numbers + kinds * np.arange(places)
        kept = self._set_clusters(chosen, group.offsets)
        shares = np.broadcast_to(dual[:, None], kept.shape)[kept]
        sums = np.bincount(numbers[kept], shares, minlength=places * kinds).astype(np.float64)
        return variance * sums.reshape(shape)

    def _shape(self, group: FeatureGroup) -> tuple[int, ...]:
        places = self.space.num_layers - group.offsets[-1] if group.by_layer else 1
        return (places, *(len(self.space.mixers),) * group.order)

    def draw_weights(
        self, variances: Mapping[FeatureGroup, float], rng: np.random.Generator
    ) -> dict[FeatureGroup, Array]:
        """Weights from their prior, for `score_of_weights`; those of the reference are 0."""
        drawn = {}
        for group in self.groups:
            weights = np.sqrt(variances[group]) * rng.normal(size=self._shape(group))
            for axis in range(1, group.order + 1):
                np.moveaxis(weights, axis, 0)[self.reference] = 0.0
            drawn[group] = weights
        return drawn

    def score_of_weights(self, constant: float, weights: Mapping[FeatureGroup, Array]) -> AdditiveScore:
        """The score ``constant`` + sum of the weights of the features that are set.

        Args:
            constant: the score of all-FA.
            weights: by group (places or 1, mixers, ...), with one axis of mixers for each layer of a cluster.
        """
        terms: dict[Offsets, Array] = {}
        for group, own in weights.items():
            whole = self._shape(FeatureGroup(group.offsets, True))
            terms[group.offsets] = terms.get(group.offsets, np.zeros(whole)) + own
        return AdditiveScore(self.space, constant, terms)


def total_kernel(kernels: Mapping[FeatureGroup, Array], variances: Mapping[FeatureGroup, float]) -> Array:
    """The sum of the groups' kernels, each times its variance."""
    return weighted_sum((kernels[group], variance) for group, variance in variances.items())


def weighted_sum(parts: Iterable[tuple[Array, float]]) -> Array:
    """The sum of arrays times numbers, with room for one product at a time."""
    total: Array | None = None
    for array, factor in parts:
        total = factor * array if total is None else np.add(total, factor * array, out=total)
    assert total is not None
    return total

"""What a surrogate says of single layers and of pairs of layers, asked of its predictions alone.

Everything is a difference of predictions, so it holds for any surrogate, whatever its features are. The
reference is the space's default placement, all-FA where layers hold it. Letters: L layers, M mixers.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np

from gearshift.placement import Placement
from gearshift.search.space import Array
from gearshift.search.surrogate import Surrogate

# Pairs of layers that are asked about at a time.
_CHUNK = 4096
# Of the largest effect of a single layer: what is less is rounding.
_NOTHING = 1e-9


@dataclass(frozen=True)
class Interaction:
    """The strongest interaction of a pair of layers.

    Attributes:
        layers: the two, the earlier first.
        mixers: which mixers there interact so.
        value: by how much both together change the value beyond what each changes alone.
    """

    layers: tuple[int, int]
    mixers: tuple[str, str]
    value: float


def layer_effects(surrogate: Surrogate) -> Array:
    """(L, M) change of the predicted value when one layer of the reference takes a mixer; NaN if not held."""
    space = surrogate.table.space
    effects = np.full((space.num_layers, len(space.mixers)), np.nan)
    reference = space.default
    cells = [(layer, mixer) for layer in range(space.num_layers) for mixer in space.allowed(layer)]
    values = surrogate.score.values([reference, *(_with(reference, {layer: m}) for layer, m in cells)])
    for (layer, mixer), value in zip(cells, (values[1:] - values[0]).tolist(), strict=True):
        effects[layer, space.mixers.index(mixer)] = value
    return effects


def strongest_interactions(surrogate: Surrogate) -> list[Interaction]:
    """The strongest interaction of each pair of layers that interact at all; none if effects add up."""
    space, reference = surrogate.table.space, surrogate.table.space.default
    alone = layer_effects(surrogate)
    nothing = _NOTHING * float(np.nanmax(np.abs(alone), initial=0.0))
    base = float(surrogate.score.values([reference])[0])
    best: dict[tuple[int, int], Interaction] = {}
    for cells in _chunks(surrogate):
        both = surrogate.score.values([_with(reference, {i: a, j: b}) for i, j, a, b in cells])
        for (i, j, a, b), value in zip(cells, both.tolist(), strict=True):
            single = alone[i, space.mixers.index(a)] + alone[j, space.mixers.index(b)]
            found = Interaction((i, j), (a, b), float(value - base - single))
            if abs(found.value) > max(nothing, abs(best[i, j].value) if (i, j) in best else 0.0):
                best[i, j] = found
    return list(best.values())


def _chunks(surrogate: Surrogate) -> Iterator[list[tuple[int, int, str, str]]]:
    """All pairs of layers with all mixers that differ from the reference, some at a time."""
    space, reference = surrogate.table.space, surrogate.table.space.default
    others = [[m for m in space.allowed(layer) if m != reference[layer]] for layer in range(space.num_layers)]
    cells = (
        (i, j, a, b)
        for i, j in itertools.combinations(range(space.num_layers), 2)
        for a in others[i]
        for b in others[j]
    )
    while chunk := list(itertools.islice(cells, _CHUNK)):
        yield chunk


def _with(reference: Placement, changes: Mapping[int, str]) -> Placement:
    return Placement(tuple(changes.get(layer, mixer) for layer, mixer in enumerate(reference)))

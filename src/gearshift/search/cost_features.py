"""What the seconds of a step are made of: one feature for each part that costs time.

A decode step of B sequences of L tokens each:
    seconds = fixed + B * sequence + (B - knee)+ * crowd
              + sum over layers of [weights + B * (state + tokens_read(L) * token)],
with one `weights`, `state` and `token` for each mixer. `fixed` is the engine's overhead and the shared
weights; `crowd` is what a sequence adds once the shared matrix products are bound by arithmetic instead of by
reading weights. What a prompt of P tokens takes is, likewise,
    seconds = fixed + P * token + sum over layers of [weights + P * state + pairs_read(P) * pair].

Where an engine is not described, every mixer may read more with more context.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from gearshift.placement import Placement, PlacementSpace
from gearshift.search.cost_engine import Engine
from gearshift.search.space import Array, mixer_indices

# Features that stand before those of the mixers, in a decode step and in a prompt.
DECODE_SHARED, PROMPT_SHARED = 3, 2
PER_MIXER = 3

# From layer and mixer to the features of that mixer there.
_Feature = Callable[[int, str], list[float]]


@dataclass(frozen=True)
class CostFeatures:
    """Features of decode steps and prompts for the placements of a space.

    Attributes:
        space: the placements.
        engine: says how much each mixer reads; None where no one knows.
        knee: sequences from which on arithmetic binds; None for never.
    """

    space: PlacementSpace
    engine: Engine | None = None
    knee: int | None = None

    def decode(self, placements: Sequence[Placement], context: int, batches: Sequence[float]) -> Array:
        """Features (n, P) of one step of each placement with its own number of sequences."""
        by_layer = self.decode_layers(context)
        mixers = self._pick(by_layer, placements)
        sizes = np.asarray(batches, dtype=np.float64)
        mixers[:, :, 1:] *= sizes[:, None, None]
        return np.concatenate([self.decode_shared(sizes), mixers.reshape(len(placements), -1)], axis=1)

    def decode_shared(self, batches: Array) -> Array:
        """(n, DECODE_SHARED): what a step takes beside its mixers."""
        crowd = np.zeros_like(batches) if self.knee is None else np.maximum(batches - self.knee, 0)
        return np.stack([np.ones_like(batches), batches, crowd], axis=1)

    def decode_layers(self, context: int) -> Array:
        """(num_layers, mixers, PER_MIXER) of one sequence: 1, 1, and the tokens read."""
        return self._layers(lambda number, mixer: [1.0, 1.0, self._tokens_read(number, mixer, context)])

    def prompt(self, placements: Sequence[Placement], tokens: int) -> Array:
        """Features (n, P) of reading a prompt of so many tokens."""

        def of(number: int, mixer: str) -> list[float]:
            return [1.0, tokens, self._pairs_read(number, mixer, tokens)]

        mixers = self._pick(self._layers(of), placements)
        shared = np.tile([1.0, tokens], (len(placements), 1))
        return np.concatenate([shared, mixers.reshape(len(placements), -1)], axis=1)

    def _layers(self, of: _Feature) -> Array:
        rows = [[of(layer, mixer) for mixer in self.space.mixers] for layer in range(self.space.num_layers)]
        return np.array(rows, dtype=np.float64)

    def _pick(self, by_layer: Array, placements: Sequence[Placement]) -> Array:
        """(n, mixers, PER_MIXER): each mixer's features, summed over the layers that have it."""
        chosen = mixer_indices(self.space, placements)
        used = (chosen[:, :, None] == np.arange(len(self.space.mixers))).astype(np.float64)
        return np.einsum("nlm,lmf->nmf", used, by_layer)

    def _tokens_read(self, layer: int, mixer: str, context: int) -> float:
        if self.engine is None:
            return context
        memory = self.engine.layers[layer].get(mixer)
        return 0.0 if memory is None else memory.tokens_read(context)

    def _pairs_read(self, layer: int, mixer: str, tokens: int) -> float:
        if self.engine is None:
            return tokens * (tokens + 1) / 2
        memory = self.engine.layers[layer].get(mixer)
        return 0.0 if memory is None else memory.pairs_read(tokens)

"""Parameters and floating-point operations of a supernet, from its config alone.

A product with a weight matrix counts 2 operations a parameter and token. Attention counts 4 for each key
that a query sees and channel, a recurrence 6 for each number of its memory. Computing layers a second time to
save memory does not count: utilisation is about useful work.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from gearshift.placement import FULL_ATTENTION, SLIDING_ATTENTION
from gearshift.supernet.checkpoint import expected_shapes
from gearshift.supernet.config import SupernetConfig
from gearshift.train.recipe import AlignStage, RecordStage, Stage

# Parts of a layer beside its mixers, and of the model beside its layers.
FFN, NORMS, EMBEDDING, HEAD = "ffn", "norms", "embedding", "head"


@dataclass(frozen=True)
class Sizes:
    """Numbers of parameters.

    Attributes:
        config: the supernet's.
        layers: for each layer, by mixer's name, ``ffn`` and ``norms``.
        embedding: of the embedding and the final norm.
        head: of the head as it computes, also where it is the embedding's matrix.
        tied: whether it is.
    """

    config: SupernetConfig
    layers: tuple[Counter[str], ...]
    embedding: int
    head: int
    tied: bool

    @classmethod
    def of(cls, config: SupernetConfig) -> Sizes:
        """Count them."""
        assert config.num_hidden_layers is not None and config.vocab_size is not None
        assert config.hidden_size is not None
        layers: tuple[Counter[str], ...] = tuple(Counter() for _ in range(config.num_hidden_layers))
        embedding = 0
        for name, shape in expected_shapes(config).items():
            parts = name.split(".")
            if parts[:2] == ["model", "layers"]:
                part = parts[4] if parts[3] == "mixers" else FFN if parts[3] == "mlp" else NORMS
                layers[int(parts[2])][part] += math.prod(shape)
            elif parts[0] == "model":
                embedding += math.prod(shape)
        head = config.vocab_size * config.hidden_size
        return cls(config, layers, embedding, head, bool(config.tie_word_embeddings))

    @property
    def total(self) -> int:
        """All parameters, shared ones once."""
        return sum(layer.total() for layer in self.layers) + self.embedding + (0 if self.tied else self.head)

    def trained(self, attention: bool) -> int:
        """Parameters of the mixers that are trained."""
        return sum(
            count
            for layer in self.layers
            for name, count in layer.items()
            if name not in (FFN, NORMS) and (attention or name != FULL_ATTENTION)
        )

    def mixer_names(self, layer: int) -> list[str]:
        """The mixers of a layer."""
        return [name for name in self.layers[layer] if name not in (FFN, NORMS)]


class Flops:
    """Floating-point operations a token of sequences of one length.

    Args:
        sizes: the supernet's.
        length: tokens of a sequence.
    """

    def __init__(self, sizes: Sizes, length: int) -> None:
        self.sizes, self.length = sizes, length

    def mixer(self, layer: int, name: str) -> float:
        """One mixer's forward pass."""
        config: Any = self.sizes.config.mixer_config(name, layer)
        return 2 * self.sizes.layers[layer][name] + self._mixing(name, config)

    def _mixing(self, name: str, config: Any) -> float:  # noqa: ANN401 - each mixer's own class
        if name in (FULL_ATTENTION, SLIDING_ATTENTION):
            window = min(config.window or self.length, self.length)
            seen = window - window * (window - 1) / (2 * self.length)  # the first tokens see fewer
            return 4 * config.num_heads * config.head_dim * seen
        key = getattr(config, "key_head_dim", None) or config.head_dim
        value = getattr(config, "value_head_dim", None) or config.head_dim
        return 6 * config.num_heads * key * value

    def forward(self, placement: Sequence[str]) -> float:
        """A forward pass with the head."""
        mixers = sum(self.mixer(layer, name) for layer, name in enumerate(placement))
        return mixers + self._ffns() + 2 * self.sizes.head

    def _ffns(self) -> float:
        return sum(2 * layer[FFN] for layer in self.sizes.layers)

    def learn(self, placement: Sequence[str], attention: bool) -> float:
        """A student's forward and backward pass: only trained weights get a gradient of their own."""
        trained = sum(
            2 * self.sizes.layers[layer][name]
            for layer, name in enumerate(placement)
            if attention or name != FULL_ATTENTION
        )
        return 2 * self.forward(placement) + trained

    def align(self) -> float:
        """A step of alignment: the teacher without its head, then every other mixer there and back."""
        layers = range(len(self.sizes.layers))
        teacher = sum(self.mixer(layer, FULL_ATTENTION) for layer in layers) + self._ffns()
        others = (
            self.mixer(layer, name)
            for layer in layers
            for name in self.sizes.mixer_names(layer)
            if name != FULL_ATTENTION
        )
        return teacher + 3 * sum(others)

    def step(self, stage: Stage, placements: Iterable[Sequence[str]], attention: bool) -> float:
        """A token of a step with these placements in turn, over all of its passes."""
        teacher = [FULL_ATTENTION] * len(self.sizes.layers)
        if isinstance(stage, AlignStage):
            return self.align()
        if isinstance(stage, RecordStage):
            return self.forward(teacher)
        offline = stage.stage == "distill" and stage.teacher_logits is not None
        taught = (stage.losses.divergences or stage.losses.activation) and not offline
        students = [self.learn(placement, attention) for placement in placements]
        mean = sum(students) / max(1, len(students))
        return mean * stage.placements_per_batch + (self.forward(teacher) if taught else 0.0)

"""Named shapes of models to measure, and the least time that a decode step of theirs can take."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gearshift.files import write_json
from gearshift.placement import (
    FULL_ATTENTION,
    GATED_DELTA_NET,
    KIMI_DELTA_ATTENTION,
    SLIDING_ATTENTION,
    Placement,
)
from gearshift.presets import Preset, write_presets
from gearshift.supernet.config import SupernetConfig

# Of an H200: copies, counting bytes read and written, and matrix products in bfloat16 (docs/LAB.md).
COPY_BYTES_PER_SECOND, OPERATIONS_PER_SECOND = 4.28e12, 8e14
WEIGHT_BYTES, STATE_BYTES = 2, 4
TAPS = 4


@dataclass(frozen=True)
class Shape:
    """A Mistral-like teacher, and the mixers that its supernet has.

    Attributes:
        layers, hidden, inner, heads, key_heads, head_dim, vocabulary: the teacher's.
        delta_key_heads: key heads of Gated DeltaNet; it has as many value heads as the teacher has heads.
        window: of sliding attention.
        counts: presets by name, as layers of (FA, SWA, KDA, GDN).
    """

    layers: int
    hidden: int
    inner: int
    heads: int
    key_heads: int
    head_dim: int
    vocabulary: int
    delta_key_heads: int
    window: int
    counts: Mapping[str, tuple[int, int, int, int]]

    @property
    def all_attention(self) -> Placement:
        """Full attention in every layer."""
        return Placement.uniform(FULL_ATTENTION, self.layers)

    @property
    def presets(self) -> dict[str, Placement]:
        """Placements by name."""
        order = (FULL_ATTENTION, SLIDING_ATTENTION, KIMI_DELTA_ATTENTION, GATED_DELTA_NET)
        return {
            name: Placement(tuple(m for m, count in zip(order, counts, strict=True) for _ in range(count)))
            for name, counts in self.counts.items()
        }

    def write_supernet(self, work: Path) -> Path:
        """A supernet directory without weights; returns it."""
        attention = {
            "num_heads": self.heads,
            "num_key_value_heads": self.key_heads,
            "head_dim": self.head_dim,
        }
        config = SupernetConfig(
            **self._shared(),
            mixers={
                FULL_ATTENTION: attention,
                SLIDING_ATTENTION: {**attention, "window": self.window},
                GATED_DELTA_NET: {
                    "num_heads": self.heads,
                    "num_key_heads": self.delta_key_heads,
                    "key_head_dim": self.head_dim,
                    "value_head_dim": self.head_dim,
                },
                KIMI_DELTA_ATTENTION: {
                    "num_heads": self.heads,
                    "head_dim": self.head_dim,
                    "gate_rank": self.head_dim,
                },
            },
            architectures=["SupernetForCausalLM"],
            dtype="bfloat16",
        )
        out = work / "supernet"
        out.mkdir(parents=True, exist_ok=True)
        config.save_pretrained(out)
        write_presets(out, [Preset(name, placement) for name, placement in self.presets.items()])
        return out

    def write_teacher(self, work: Path) -> Path:
        """A directory of vLLM's own model of this shape, without weights; returns it."""
        out = work / "teacher"
        out.mkdir(parents=True, exist_ok=True)
        config = {
            **self._shared(),
            "architectures": ["MistralForCausalLM"],
            "model_type": "mistral",
            "num_key_value_heads": self.key_heads,
            "sliding_window": None,
            "dtype": "bfloat16",
        }
        write_json(out / "config.json", config)
        return out

    def _shared(self) -> dict[str, Any]:
        return {
            "vocab_size": self.vocabulary,
            "hidden_size": self.hidden,
            "intermediate_size": self.inner,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads,
            "head_dim": self.head_dim,
            "max_position_embeddings": 262_144,
            "rms_norm_eps": 1e-5,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e8},
            "tie_word_embeddings": False,
        }

    def mixer_weights(self, mixer: str) -> int:
        """Numbers in the matrices of one mixer."""
        size, key_size = self.heads * self.head_dim, self.key_heads * self.head_dim
        if mixer == GATED_DELTA_NET:
            return self.hidden * (2 * self.delta_key_heads * self.head_dim + 3 * size + 2 * self.heads)
        if mixer == KIMI_DELTA_ATTENTION:
            low_rank = 2 * self.head_dim * (self.hidden + size)
            return self.hidden * (4 * size + self.heads) + low_rank
        return self.hidden * (2 * size + 2 * key_size)

    def cache_traffic(self, mixer: str, context: int) -> int:
        """Bytes of cache that a layer moves for a token: keys and values read, a state read and written."""
        if mixer in (FULL_ATTENTION, SLIDING_ATTENTION):
            tokens = context if mixer == FULL_ATTENTION else min(context, self.window)
            return 2 * tokens * self.key_heads * self.head_dim * WEIGHT_BYTES
        channels = 3 * self.heads * self.head_dim
        if mixer == GATED_DELTA_NET:
            channels = (2 * self.delta_key_heads + self.heads) * self.head_dim
        return 2 * (self.heads * self.head_dim**2 * STATE_BYTES + channels * (TAPS - 1) * WEIGHT_BYTES)


def floor_seconds(shape: Shape, placement: Placement, context: int, batch: int) -> float:
    """The least seconds of one decode step of an H200: bytes moved, or operations done.

    Weights are read once: embeddings count as one row a request, the head and FFNs whole.
    """
    shared = shape.layers * 3 * shape.hidden * shape.inner + shape.vocabulary * shape.hidden
    weights = shared + sum(shape.mixer_weights(mixer) for mixer in placement)
    cache = sum(shape.cache_traffic(mixer, context) for mixer in placement)
    moved = weights * WEIGHT_BYTES + batch * cache
    return max(moved / COPY_BYTES_PER_SECOND, 2 * weights * batch / OPERATIONS_PER_SECOND)


SHAPES = {
    "apriel-15b": Shape(
        layers=48,
        hidden=5120,
        inner=14336,
        heads=32,
        key_heads=8,
        head_dim=128,
        vocabulary=131_072,
        delta_key_heads=8,
        window=4096,
        counts={
            "12_26_6_4": (12, 26, 6, 4),
            "13_32_1_2": (13, 32, 1, 2),
            "3_25_4_16": (3, 25, 4, 16),
            "0_30_5_13": (0, 30, 5, 13),
            "0_16_13_19": (0, 16, 13, 19),
            "0_10_5_33": (0, 10, 5, 33),
        },
    ),
    # For tests, and for a look without a large GPU.
    "tiny": Shape(
        layers=6,
        hidden=64,
        inner=96,
        heads=4,
        key_heads=2,
        head_dim=32,
        vocabulary=257,
        delta_key_heads=2,
        window=24,
        counts={"half": (2, 2, 1, 1), "fast": (0, 0, 2, 4)},
    ),
}

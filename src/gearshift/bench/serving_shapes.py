"""Shapes to serve with their presets, and the least time that a decode step of theirs can take."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from gearshift.bench.shapes import Shape, named_shape
from gearshift.files import write_json
from gearshift.placement import (
    FULL_ATTENTION,
    GATED_DELTA_NET,
    KIMI_DELTA_ATTENTION,
    SLIDING_ATTENTION,
    Placement,
)
from gearshift.presets import Preset, write_presets

# Of an H200: copies, counting bytes read and written, and matrix products in bfloat16.
COPY_BYTES_PER_SECOND, OPERATIONS_PER_SECOND = 4.28e12, 8e14
WEIGHT_BYTES, STATE_BYTES = 2, 4
TAPS = 4
# Presets by shape and name, as layers of (FA, SWA, KDA, GDN).
COUNTS: dict[str, Mapping[str, tuple[int, int, int, int]]] = {
    # Published with their speeds (arXiv 2604.19877).
    "apriel-15b": {
        "12_26_6_4": (12, 26, 6, 4),
        "13_32_1_2": (13, 32, 1, 2),
        "3_25_4_16": (3, 25, 4, 16),
        "0_30_5_13": (0, 30, 5, 13),
        "0_16_13_19": (0, 16, 13, 19),
        "0_10_5_33": (0, 10, 5, 33),
    },
    "tiny": {"half": (1, 1, 1, 1), "fast": (0, 0, 1, 3)},
}


@dataclass(frozen=True)
class ServedShape:
    """A shape, and the presets that are measured of it.

    Attributes:
        shape: sizes.
        presets: placements by name.
    """

    shape: Shape
    presets: Mapping[str, Placement]

    @classmethod
    def named(cls, name: str) -> ServedShape:
        """One of `COUNTS`."""
        order = (FULL_ATTENTION, SLIDING_ATTENTION, KIMI_DELTA_ATTENTION, GATED_DELTA_NET)
        return cls(
            named_shape(name),
            {
                preset: Placement(tuple(m for m, n in zip(order, counts, strict=True) for _ in range(n)))
                for preset, counts in COUNTS[name].items()
            },
        )

    @property
    def all_attention(self) -> Placement:
        """Full attention in every layer."""
        return Placement.uniform(FULL_ATTENTION, self.shape.layers)

    def write_supernet(self, work: Path) -> Path:
        """A supernet directory without weights; returns it."""
        out = work / "supernet"
        out.mkdir(parents=True, exist_ok=True)
        config = self.shape.config()
        config.architectures, config.dtype = ["SupernetForCausalLM"], "bfloat16"
        config.save_pretrained(out)
        write_presets(out, [Preset(name, placement) for name, placement in self.presets.items()])
        return out

    def write_teacher(self, work: Path) -> Path:
        """A directory of vLLM's own model of this shape, without weights; returns it."""
        out, config = work / "teacher", self.shape.config()
        out.mkdir(parents=True, exist_ok=True)
        shared = (
            *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"),
            *("head_dim", "max_position_embeddings", "rms_norm_eps", "rope_parameters"),
        )
        own = {
            "architectures": ["MistralForCausalLM"],
            "model_type": "mistral",
            "num_key_value_heads": self.shape.kv_heads,
            "sliding_window": None,
            "tie_word_embeddings": False,
            "dtype": "bfloat16",
        }
        write_json(out / "config.json", own | {name: getattr(config, name) for name in shared})
        return out


def mixer_weights(shape: Shape, mixer: str) -> int:
    """Numbers in the matrices of one mixer."""
    size, key_size = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    if mixer == GATED_DELTA_NET:
        return shape.hidden * (2 * key_size + 3 * size + 2 * shape.heads)
    if mixer == KIMI_DELTA_ATTENTION:
        low_rank = 2 * shape.head_dim * (shape.hidden + size)
        return shape.hidden * (4 * size + shape.heads) + low_rank
    return shape.hidden * (2 * size + 2 * key_size)


def cache_traffic(shape: Shape, mixer: str, context: int) -> int:
    """Bytes of cache that a layer moves for a token: keys and values read, a state read and written."""
    size, key_size = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    if mixer in (FULL_ATTENTION, SLIDING_ATTENTION):
        tokens = context if mixer == FULL_ATTENTION else min(context, shape.window)
        return 2 * tokens * key_size * WEIGHT_BYTES
    channels = 2 * key_size + size if mixer == GATED_DELTA_NET else 3 * size
    return 2 * (size * shape.head_dim * STATE_BYTES + channels * (TAPS - 1) * WEIGHT_BYTES)


def floor_seconds(shape: Shape, placement: Placement, context: int, batch: int) -> float:
    """The least seconds of one decode step of an H200: bytes moved, or operations done.

    Weights are read once: embeddings count as one row a request, the head and FFNs whole.
    """
    shared = shape.layers * 3 * shape.hidden * shape.ffn + shape.vocabulary * shape.hidden
    weights = shared + sum(mixer_weights(shape, mixer) for mixer in placement)
    cache = sum(cache_traffic(shape, mixer, context) for mixer in placement)
    moved = weights * WEIGHT_BYTES + batch * cache
    return max(moved / COPY_BYTES_PER_SECOND, 2 * weights * batch / OPERATIONS_PER_SECOND)

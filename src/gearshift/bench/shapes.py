"""Supernets by size, for measurements that need no trained weights."""

from __future__ import annotations

from dataclasses import dataclass

from gearshift.errors import GearshiftError
from gearshift.supernet import SupernetConfig


class ShapeError(GearshiftError, ValueError):
    """No shape has this name."""


@dataclass(frozen=True)
class Shape:
    """Sizes of a Llama-like supernet with all four mixers.

    Attributes:
        layers: decoder layers.
        hidden: channels between them.
        ffn: inner channels of the gated FFN.
        heads: query heads, and value heads of the delta rules.
        kv_heads: key/value heads, and key heads of Gated DeltaNet.
        head_dim: channels of every head.
        vocabulary: tokens, with a head of its own.
        window: tokens that sliding attention sees.
    """

    layers: int
    hidden: int
    ffn: int
    heads: int
    kv_heads: int
    head_dim: int
    vocabulary: int
    window: int

    def config(self) -> SupernetConfig:
        """The supernet's configuration."""
        attention = {
            "num_heads": self.heads,
            "num_key_value_heads": self.kv_heads,
            "head_dim": self.head_dim,
        }
        delta = {
            "num_heads": self.heads,
            "num_key_heads": self.kv_heads,
            "key_head_dim": self.head_dim,
            "value_head_dim": self.head_dim,
        }
        return SupernetConfig(
            vocab_size=self.vocabulary,
            hidden_size=self.hidden,
            intermediate_size=self.ffn,
            num_hidden_layers=self.layers,
            num_attention_heads=self.heads,
            head_dim=self.head_dim,
            max_position_embeddings=262144,
            rope_parameters={"rope_type": "default", "rope_theta": 1000000.0},
            mixers={
                "full_attention": attention,
                "sliding_attention": {**attention, "window": self.window},
                "gated_delta_net": delta,
                "kimi_delta_attention": {
                    "num_heads": self.heads,
                    "head_dim": self.head_dim,
                    "gate_rank": self.head_dim,
                },
            },
        )


SHAPES = {
    # Super Apriel's backbone (arXiv 2604.19877).
    "apriel-15b": Shape(48, 5120, 14336, 32, 8, 128, 131072, 4096),
    # About the sizes of a small Llama: 0.3 billion parameters with all mixers, 0.2 in any placement.
    "200m": Shape(12, 1024, 2816, 16, 4, 64, 32000, 1024),
    # For a first look at a command, on a CPU.
    "tiny": Shape(4, 64, 96, 4, 2, 32, 256, 32),
}


def named_shape(name: str) -> Shape:
    """One of `SHAPES`.

    Raises:
        ShapeError: there is none of this name.
    """
    if name not in SHAPES:
        raise ShapeError(f"there is no shape {name!r}; choose one of {', '.join(SHAPES)}")
    return SHAPES[name]

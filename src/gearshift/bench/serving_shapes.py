"""Shapes to serve with their presets, and the least time that a decode step of theirs can take."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from gearshift.bench.engine import describe_slots
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
from gearshift.search.cost_engine import Engine
from gearshift.serve.vllm.geometry import CacheTypes, default_block_tokens
from gearshift.serve.vllm.options import Options

# Of an H200: copies, counting bytes read and written, and matrix products in bfloat16.
COPY_BYTES_PER_SECOND, OPERATIONS_PER_SECOND = 4.28e12, 8e14
WEIGHT_BYTES = 2
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

    def engine(self) -> Engine:
        """The vLLM plugin with its defaults on one GPU: what weights and caches take."""
        config, types = self.shape.config(), CacheTypes(torch.bfloat16, torch.float32, torch.bfloat16)
        slots = Options().slots_for(self.shape.layers)
        tokens = default_block_tokens(config, types, 1, slots)
        return describe_slots(config, types, torch.bfloat16, block_tokens=tokens, slots=slots, in_flight=2)

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


def floor_seconds(shape: Shape, engine: Engine, placement: Placement, context: int, batch: int) -> float:
    """The least seconds of one decode step of an H200: bytes moved, or operations done.

    Weights are read once, of the embeddings a row for each request; keys and values are read, states read and
    written.
    """
    embeddings = shape.vocabulary * shape.hidden * WEIGHT_BYTES
    used = [layer[mixer] for layer, mixer in zip(engine.layers, placement, strict=True)]
    weights = engine.shared_weight_bytes - embeddings + sum(memory.weight_bytes for memory in used)
    cache = sum(memory.sequence_bytes(context) * (2 if memory.kind == "state" else 1) for memory in used)
    operations = 2 * batch * weights / WEIGHT_BYTES
    return max((weights + batch * cache) / COPY_BYTES_PER_SECOND, operations / OPERATIONS_PER_SECOND)

"""A made-up GPU: decode steps of the 15B shape as physics would have them. Nothing was measured."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch

from gearshift.bench.engine import describe_slots
from gearshift.bench.shapes import named_shape
from gearshift.placement import Placement
from gearshift.search.cost_engine import Engine
from gearshift.serve.vllm.geometry import CacheTypes

CONTEXTS = (4096, 16384, 32768, 131072)
BATCHES: tuple[int | None, ...] = (1, 8, 32, None)
MEMORY = 70 * 2**30
BANDWIDTH, FLOPS = 4.3e12, 6e14
# Seconds: of a step, of a layer, and of a sequence in a layer, beside what bytes and products take.
STEP, LAYER, SEQUENCE = 4e-4, 4e-6, {"gated_delta_net": 2e-7, "kimi_delta_attention": 4e-7}


def made_up_engine() -> Engine:
    types = CacheTypes(torch.bfloat16, torch.float32, torch.bfloat16)
    return describe_slots(
        named_shape("apriel-15b").config(), types, torch.bfloat16, block_tokens=64, slots=12, in_flight=1
    )


def true_seconds(engine: Engine, placement: Placement, context: int, batch: int) -> float:
    """Weights are read once a step, unless their products take longer; then caches, and launches."""
    used = [layer[mixer] for layer, mixer in zip(engine.layers, placement, strict=True)]
    weights = engine.shared_weight_bytes + sum(memory.weight_bytes for memory in used)
    # A product of one sequence is a multiplication and an addition for each weight, of two bytes.
    products = max(weights / BANDWIDTH, batch * weights / FLOPS)
    read = sum(max(memory.tokens_read(context), 1) * memory.cache_bytes for memory in used)
    extra = sum(SEQUENCE.get(mixer, 0.0) for mixer in placement)
    return STEP + LAYER * len(used) + products + batch * (read / BANDWIDTH + extra)


def make_rows(
    engine: Engine, placements: Sequence[Placement], noise: float, seed: int = 0
) -> Iterator[dict[str, Any]]:
    rng = np.random.default_rng(seed)
    for placement in placements:
        for context in CONTEXTS:
            for wanted in BATCHES:
                most = engine.largest_batch(placement, context, MEMORY)
                batch = most if wanted is None else wanted
                if batch > most:
                    continue
                seconds = true_seconds(engine, placement, context, batch)
                yield {
                    "placement": str(placement),
                    "context_length": context,
                    "batch_size": batch,
                    "seconds_per_step": seconds * float(np.exp(noise * rng.normal())),
                    "memory_bytes": MEMORY if wanted is None else None,
                    "hardware": "a made-up GPU",
                    "engine": engine.to_json(),
                }


def draw(engine: Engine, count: int, seed: int) -> list[Placement]:
    rng = random.Random(seed)
    return [engine.space.sample_composition(rng) for _ in range(count)]

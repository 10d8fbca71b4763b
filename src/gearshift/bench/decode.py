"""Seconds of a decode step by placement, context length and batch size.

Caches are filled with random keys and values instead of being prefilled: a decode step costs the same, and
long contexts need no time to get there. The placements take turns, so that a slow moment of the machine hits
all alike.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from gearshift.bench.engine import describe_embedded
from gearshift.errors import GearshiftError
from gearshift.placement import FULL_ATTENTION, Placement, PlacementSpace
from gearshift.progress import show_progress
from gearshift.provenance import hardware, provenance
from gearshift.search.cost_engine import Engine
from gearshift.supernet import SupernetCache, SupernetForCausalLM
from gearshift.supernet.cache import KeyValueState

# Tokens really run to give every state its shape before the rest is filled in.
WARM_UP_TOKENS = 8

Row = dict[str, Any]


class BenchError(GearshiftError, ValueError):
    """A measurement is asked for that cannot be made."""


def cost_placements(space: PlacementSpace) -> list[Placement]:
    """What a cost model is fitted to: each mixer in every layer, and in every other layer beside all-FA.

    Where not every layer holds every mixer, each one stands in all layers that hold the same mixers, so that
    every cost that a choice can depend on is settled, and the default placement is beside it.
    """
    groups = [
        Placement(tuple(mixer if held == group else held[0] for held in space.layers))
        for group in dict.fromkeys(space.layers)
        for mixer in group
    ]
    default = space.default
    halves = [
        Placement(
            tuple(default[layer] if layer % 2 else own for layer, own in enumerate(space.mostly(mixer)))
        )
        for mixer in space.mixers
    ]
    return list(dict.fromkeys(groups + halves))


@dataclass(frozen=True)
class DecodeSettings:
    """How decode steps are measured.

    Attributes:
        batch_size: sequences decoded together, where no memory is given.
        memory_bytes: memory for caches, in which as many sequences of each placement run as fit.
        prefill: also time a prompt as long as the context.
        steps: decode steps timed together.
        rounds: how many times each placement has its turn.
        seed: of the random caches.
    """

    batch_size: int = 1
    memory_bytes: int | None = None
    prefill: bool = False
    steps: int = 3
    rounds: int = 5
    seed: int = 0


@dataclass
class _Times:
    """Seconds of one placement at one context, a number a round."""

    batch_size: int
    steps: list[float] = field(default_factory=list)
    prefills: list[float] = field(default_factory=list)


@torch.inference_mode()
def measure_decode(
    model: SupernetForCausalLM,
    placements: Sequence[Placement],
    context_lengths: Sequence[int],
    settings: DecodeSettings | None = None,
    progress: bool = True,
) -> list[Row]:
    """Measure every placement at every context length.

    Args:
        model: on the device to measure.
        placements: which; all-FA, if the model has it, is measured too, since speed-ups refer to it.
        context_lengths: cached tokens of each sequence.
        settings: how.
        progress: show a progress bar.

    Returns:
        A row for each placement and context length, as docs/directories.md describes them. All-FA, if the
        model has it, comes first at every context length.

    Raises:
        BenchError: a context too short to measure.
        CostError: not even one sequence of a placement fits into the memory.
    """
    settings = settings or DecodeSettings()
    space = model.placement_space
    teacher = Placement.uniform(FULL_ATTENTION, space.num_layers)
    first = [teacher] if space.holds(teacher) else []
    wanted = list(dict.fromkeys([*first, *(space.check(placement) for placement in placements)]))
    for context in context_lengths:
        if context <= WARM_UP_TOKENS:
            raise BenchError(f"context length {context}; expected more than {WARM_UP_TOKENS} tokens")
    engine = describe_embedded(model)
    batches = {c: {p: _batch_size(engine, p, c, settings) for p in wanted} for c in context_lengths}
    rows = []
    with show_progress("measure", len(batches) * settings.rounds, enabled=progress) as report:
        for number, (context, sizes) in enumerate(batches.items()):
            times = {placement: _Times(size) for placement, size in sizes.items()}
            for turn in range(settings.rounds):
                for placement, found in times.items():
                    _take_turn(model, placement, context, found, settings)
                report(number * settings.rounds + turn + 1, f"context {context}")
            rows += _rows(times, context, engine, settings)
    return rows


def _batch_size(engine: Engine, placement: Placement, context: int, settings: DecodeSettings) -> int:
    if settings.memory_bytes is None:
        return settings.batch_size
    return engine.largest_batch(placement, context, settings.memory_bytes)


def _take_turn(
    model: SupernetForCausalLM, placement: Placement, context: int, times: _Times, settings: DecodeSettings
) -> None:
    cache = filled_cache(model, placement, context, times.batch_size, settings.seed)
    times.steps.append(_time_steps(model, cache, times.batch_size, settings.steps))
    if settings.prefill:
        times.prefills.append(_time_prefill(model, placement, context))


def _time_steps(model: SupernetForCausalLM, cache: SupernetCache, batch_size: int, steps: int) -> float:
    """Seconds of one decode step, a mean over ``steps``."""
    token = torch.zeros(batch_size, 1, dtype=torch.long, device=model.device)
    # Grows the buffers and loads the weights.
    model(token, past_key_values=cache, placement=cache.placement)
    _synchronize(model.device)
    began = time.perf_counter()
    for _ in range(steps):
        model(token, past_key_values=cache, placement=cache.placement)
    _synchronize(model.device)
    return (time.perf_counter() - began) / steps


def _time_prefill(model: SupernetForCausalLM, placement: Placement, tokens: int) -> float:
    """Seconds from a prompt of so many tokens to its first token, one sequence alone."""
    prompt = torch.zeros(1, tokens, dtype=torch.long, device=model.device)
    cache = model.new_cache(placement)
    _synchronize(model.device)
    began = time.perf_counter()
    model(prompt, past_key_values=cache, placement=placement, logits_to_keep=1).logits.argmax(-1)
    _synchronize(model.device)
    return time.perf_counter() - began


def filled_cache(
    model: SupernetForCausalLM, placement: Placement, context: int, batch_size: int, seed: int
) -> SupernetCache:
    """A cache as it is after ``context`` tokens, with random content in the attention layers.

    States of fixed size are what a few real tokens leave: their cost does not depend on the context.
    """
    generator = torch.Generator(model.device).manual_seed(seed)
    cache = model.new_cache(placement)
    first = torch.zeros(batch_size, WARM_UP_TOKENS, dtype=torch.long, device=model.device)
    model(first, past_key_values=cache, placement=placement)
    rest = context - WARM_UP_TOKENS
    for state in cache.states:
        if isinstance(state, KeyValueState):
            keys, values = (_random_like(x, rest, generator) for x in state.kept())
            state.append(keys, values)
    cache.length = context
    return cache


def _random_like(x_BHTK: torch.Tensor, tokens: int, generator: torch.Generator) -> torch.Tensor:
    """Random content for ``tokens`` tokens; every sequence gets the same, and reads no less for it."""
    shape = (1, x_BHTK.shape[1], tokens, x_BHTK.shape[3])
    one = torch.randn(shape, generator=generator, device=x_BHTK.device, dtype=x_BHTK.dtype)
    return one.expand(x_BHTK.shape[0], -1, -1, -1)


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _rows(
    times: dict[Placement, _Times], context: int, engine: Engine, settings: DecodeSettings
) -> Iterator[Row]:
    for placement, found in times.items():
        yield {
            "placement": str(placement),
            "context_length": context,
            "batch_size": found.batch_size,
            "seconds_per_step": statistics.median(found.steps),
            "seconds_least": min(found.steps),
            "seconds_most": max(found.steps),
            "prefill_seconds": statistics.median(found.prefills) if found.prefills else None,
            "cache_bytes": engine.sequence_bytes(placement, context),
            "memory_bytes": settings.memory_bytes,
            "hardware": hardware(),
            "engine": engine.to_json(),
            "provenance": provenance(),
        }

"""Seconds of a decode step by placement, context length and batch size.

Caches are filled with random keys and values instead of being prefilled: a decode step costs the same, and
long contexts need no time to get there. The placements take turns, so that a slow moment of the machine hits
all alike.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator, Sequence
from typing import Any

import torch

from gearshift.errors import GearshiftError
from gearshift.placement import FULL_ATTENTION, Placement, PlacementSpace
from gearshift.progress import show_progress
from gearshift.provenance import hardware, provenance
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


@torch.inference_mode()
def measure_decode(
    model: SupernetForCausalLM,
    placements: Sequence[Placement],
    context_lengths: Sequence[int],
    batch_size: int,
    *,
    steps: int = 3,
    rounds: int = 5,
    seed: int = 0,
    progress: bool = True,
) -> list[Row]:
    """Measure every placement at every context length.

    Args:
        model: on the device to measure.
        placements: which; all-FA, if the model has it, is measured too, since speed-ups refer to it.
        context_lengths: cached tokens of each sequence.
        batch_size: sequences decoded together.
        steps: decode steps timed together.
        rounds: how many times each placement has its turn.
        seed: of the random caches.
        progress: show a progress bar.

    Returns:
        A row for each placement and context length: ``placement``, ``context_length``, ``batch_size``,
        ``seconds_per_step`` (median over rounds), ``seconds_least``, ``seconds_most``, ``hardware``,
        ``provenance``. All-FA, if the model has it, comes first at every context length.

    Raises:
        BenchError: a context too short to measure.
    """
    space = model.placement_space
    teacher = Placement.uniform(FULL_ATTENTION, space.num_layers)
    first = [teacher] if space.holds(teacher) else []
    wanted = list(dict.fromkeys([*first, *(space.check(placement) for placement in placements)]))
    for context in context_lengths:
        if context <= WARM_UP_TOKENS:
            raise BenchError(f"context length {context}; expected more than {WARM_UP_TOKENS} tokens")
    rows = []
    with show_progress("measure", len(context_lengths) * rounds, enabled=progress) as report:
        for number, context in enumerate(context_lengths):
            times: dict[Placement, list[float]] = {placement: [] for placement in wanted}
            for turn in range(rounds):
                for placement in wanted:
                    times[placement].append(_time_steps(model, placement, context, batch_size, steps, seed))
                report(number * rounds + turn + 1, f"context {context}")
            rows += _rows(times, context, batch_size)
    return rows


def _time_steps(
    model: SupernetForCausalLM, placement: Placement, context: int, batch_size: int, steps: int, seed: int
) -> float:
    """Seconds of one decode step, a mean over ``steps``."""
    cache = filled_cache(model, placement, context, batch_size, seed)
    token = torch.zeros(batch_size, 1, dtype=torch.long, device=model.device)
    model(token, past_key_values=cache, placement=placement)  # grows the buffers and loads the weights
    _synchronize(model.device)
    began = time.perf_counter()
    for _ in range(steps):
        model(token, past_key_values=cache, placement=placement)
    _synchronize(model.device)
    return (time.perf_counter() - began) / steps


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


def _rows(times: dict[Placement, list[float]], context: int, batch_size: int) -> Iterator[Row]:
    for placement, seconds in times.items():
        yield {
            "placement": str(placement),
            "context_length": context,
            "batch_size": batch_size,
            "seconds_per_step": statistics.median(seconds),
            "seconds_least": min(seconds),
            "seconds_most": max(seconds),
            "hardware": hardware(),
            "provenance": provenance(),
        }

"""Descriptions of engines for measured rows: what a sequence's cache and each mixer's weights take."""

from __future__ import annotations

import torch
from torch import nn

from gearshift.search.cost_engine import Engine, MixerMemory
from gearshift.serve.embedded.cache_size import state_bytes
from gearshift.serve.vllm.geometry import CacheTypes, StateShape, cache_kind, demands, widest_window
from gearshift.slot_layout import SlotLayout
from gearshift.supernet import MixerState, SupernetConfig, SupernetForCausalLM
from gearshift.supernet.cache import KeyValueState
from gearshift.supernet.mixer_configs import AttentionConfig


@torch.inference_mode()
def describe_embedded(model: SupernetForCausalLM) -> Engine:
    """The embedded engine: caches as large as what they hold, asked of the mixers themselves."""
    space = model.placement_space
    layers: list[dict[str, MixerMemory]] = [{} for _ in range(space.num_layers)]
    weights = _mixer_weights(model)
    token_11 = torch.zeros(1, 1, dtype=torch.long, device=model.device)
    for mixer in space.mixers:
        placement = space.mostly(mixer)
        cache = model.new_cache(placement)
        model(token_11, past_key_values=cache, placement=placement)
        for number, (used, state) in enumerate(zip(placement, cache.states, strict=True)):
            layers[number][used] = _memory_of(state, weights[number][used])
    return Engine("embedded", _weight_bytes(model) - _total(weights), tuple(layers))


def _memory_of(state: MixerState, weight_bytes: int) -> MixerMemory:
    """What a layer's state holds, given that one token was run."""
    if not isinstance(state, KeyValueState):
        return MixerMemory("state", state_bytes(state, 1), weight_bytes)
    return MixerMemory(
        "full" if state.window is None else "window", state_bytes(state, 1), weight_bytes, state.window
    )


def describe_slots(
    config: SupernetConfig,
    types: CacheTypes,
    dtype: torch.dtype,
    *,
    block_tokens: int,
    slots: int,
    in_flight: int,
) -> Engine:
    """The vLLM plugin on one GPU: caches cut into slots on super-pages.

    Args:
        config: of the supernet.
        types: element types of the caches.
        dtype: of the weights.
        block_tokens: tokens of an attention page.
        slots: attention pages on a super-page.
        in_flight: tokens that are scheduled but not finished at most.
    """
    with torch.device("meta"):
        model = SupernetForCausalLM(config)
    model.to(dtype=dtype)  # pyright: ignore[reportCallIssue] - Transformers' wrapper hides torch's signature
    weights = _mixer_weights(model)
    layout = SlotLayout.plan(
        demands(config, block_tokens, types, 1),
        layers=len(weights),
        block_tokens=block_tokens,
        slots=slots,
        window=widest_window(config),
    )
    layers = tuple(
        {name: _slot_memory(config, number, name, types, size) for name, size in mixers.items()}
        for number, mixers in enumerate(weights)
    )
    return Engine("vllm", _weight_bytes(model) - _total(weights), layers, layout, in_flight)


def _slot_memory(
    config: SupernetConfig, layer: int, name: str, types: CacheTypes, weight_bytes: int
) -> MixerMemory:
    mixer = config.mixer_config(name, layer)
    kind = cache_kind(mixer)
    if isinstance(mixer, AttentionConfig):
        token = 2 * mixer.num_key_value_heads * mixer.head_dim * types.keys.itemsize
        return MixerMemory(kind, token, weight_bytes, mixer.window)
    return MixerMemory(kind, StateShape.of(mixer, 1).bytes(types.memory, types.inputs), weight_bytes)


def _mixer_weights(model: SupernetForCausalLM) -> list[dict[str, int]]:
    """Bytes of weights by layer and mixer."""
    found: list[dict[str, int]] = []
    for layer in model.model.layers:
        mixers = layer.mixers
        assert isinstance(mixers, nn.ModuleDict)
        found.append({name: _weight_bytes(mixer) for name, mixer in mixers.items()})
    return found


def _weight_bytes(module: nn.Module) -> int:
    return sum(parameter.nbytes for parameter in module.parameters())


def _total(weights: list[dict[str, int]]) -> int:
    return sum(sum(layer.values()) for layer in weights)

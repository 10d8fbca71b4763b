"""The sizes of a supernet's caches on one tensor-parallel rank, and what this plugin does not serve.

Letters: H heads of queries or values, G heads of keys, K key channels, V value channels, C channels of the
short convolutions; all of one rank.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

from gearshift.errors import GearshiftError
from gearshift.slot_layout import PAGE_ALIGNMENT, Demand, Kind
from gearshift.supernet.config import SupernetConfig
from gearshift.supernet.mixer_configs import (
    AttentionConfig,
    GatedDeltaNetConfig,
    KimiDeltaAttentionConfig,
)

# Larger pages waste more at the end of a request and at the edge of a window, smaller ones need more groups.
_STATES_PER_BLOCK = 2
_LEAST_BLOCK, _LARGEST_BLOCK = 32, 1024
# Their inverse frequencies depend on the length of the text, so no table of cosines holds for all of it.
_CHANGING_ROPES = ("dynamic", "longrope")


class UnservableError(GearshiftError):
    """The supernet has something that this plugin cannot serve."""


@dataclass(frozen=True)
class StateShape:
    """A layer's recurrent state: memory (H, V, K), then the convolutions' last inputs (C, taps - 1)."""

    heads: int
    value_dim: int
    key_dim: int
    channels: int
    taps: int

    @classmethod
    def of(cls, config: GatedDeltaNetConfig | KimiDeltaAttentionConfig, ranks: int) -> StateShape:
        """The state of a mixer's part on one of so many ranks."""
        heads = config.num_heads // ranks
        if isinstance(config, GatedDeltaNetConfig):
            channels = (
                2 * config.num_key_heads * config.key_head_dim + config.num_heads * config.value_head_dim
            )
            sizes = (config.value_head_dim, config.key_head_dim)
        else:
            channels = 3 * config.num_heads * config.head_dim
            sizes = (config.head_dim, config.head_dim)
        return cls(heads, *sizes, channels // ranks, config.conv_kernel)

    def bytes(self, memory: torch.dtype, inputs: torch.dtype) -> int:
        """Size of a page, the inputs beginning at `inputs_offset`."""
        size = self.inputs_offset(memory) + self.channels * (self.taps - 1) * inputs.itemsize
        return _aligned(size)

    def inputs_offset(self, memory: torch.dtype) -> int:
        """Where in a page the convolutions' inputs begin, in bytes."""
        return _aligned(self.heads * self.value_dim * self.key_dim * memory.itemsize)


@dataclass(frozen=True)
class CacheTypes:
    """Element types: of keys and values, of the memory of states, and of the convolutions' inputs."""

    keys: torch.dtype
    memory: torch.dtype
    inputs: torch.dtype


def cache_kind(mixer_config: Any) -> Kind:  # noqa: ANN401 - each mixer's own class
    """The kind of cache that a mixer needs.

    Raises:
        UnservableError: it is a mixer of somebody else.
    """
    if isinstance(mixer_config, AttentionConfig):
        return "full" if mixer_config.window is None else "window"
    if isinstance(mixer_config, GatedDeltaNetConfig | KimiDeltaAttentionConfig):
        return "state"
    raise UnservableError(
        f"{type(mixer_config).__name__} belongs to a mixer that the vLLM plugin does not know; "
        "it serves full, sliding, Gated DeltaNet and Kimi Delta attention"
    )


def held_mixers(config: SupernetConfig) -> Iterator[tuple[int, str, Any]]:
    """Layer, mixer name and mixer configuration of every mixer of a supernet."""
    assert config.num_hidden_layers is not None
    for layer in range(config.num_hidden_layers):
        for name in config.layer_mixer_names(layer):
            yield layer, name, config.mixer_config(name, layer)


def layer_kinds(config: SupernetConfig) -> list[dict[str, Kind]]:
    """For each layer, the kind of cache of each mixer that it holds."""
    assert config.num_hidden_layers is not None
    kinds: list[dict[str, Kind]] = [{} for _ in range(config.num_hidden_layers)]
    for layer, name, mixer in held_mixers(config):
        kinds[layer][name] = cache_kind(mixer)
    return kinds


def widest_window(config: SupernetConfig) -> int:
    """Tokens that the widest window of the model sees; 0 if there is none."""
    windows = [m.window for _, _, m in held_mixers(config) if isinstance(m, AttentionConfig)]
    return max((window for window in windows if window is not None), default=0)


def page_bytes(mixer_config: Any, block_tokens: int, types: CacheTypes, ranks: int) -> int:  # noqa: ANN401
    """Bytes of one page of a mixer on one rank."""
    if isinstance(mixer_config, AttentionConfig):
        heads = max(1, mixer_config.num_key_value_heads // ranks)
        return 2 * block_tokens * heads * mixer_config.head_dim * types.keys.itemsize
    return StateShape.of(mixer_config, ranks).bytes(types.memory, types.inputs)


def demands(config: SupernetConfig, block_tokens: int, types: CacheTypes, ranks: int) -> dict[Kind, Demand]:
    """What the layers ask of each kind of cache."""
    largest: dict[Kind, int] = {}
    layers: dict[Kind, set[int]] = {}
    for layer, _, mixer in held_mixers(config):
        kind = cache_kind(mixer)
        size = page_bytes(mixer, block_tokens, types, ranks)
        largest[kind] = max(largest.get(kind, 0), size)
        layers.setdefault(kind, set()).add(layer)
    if "window" in largest and "full" not in largest:
        # vLLM clears recycled pages through the first group of full attention, so there must be one.
        largest["full"], layers["full"] = largest["window"], {0}
    return {kind: Demand(size, len(layers[kind])) for kind, size in largest.items()}


def default_block_tokens(config: SupernetConfig, types: CacheTypes, ranks: int, slots: int) -> int:
    """The smallest power of two for which a super-page of attention pages holds a few states."""
    tokens = _LEAST_BLOCK
    while tokens < _LARGEST_BLOCK:
        sizes = {kind: demand.page_bytes for kind, demand in demands(config, tokens, types, ranks).items()}
        attention = max(sizes.get("full", 0), sizes.get("window", 0))
        if not attention or slots * attention >= _STATES_PER_BLOCK * sizes.get("state", 0):
            break
        tokens *= 2
    return tokens


def check_servable(config: SupernetConfig, ranks: int) -> None:
    """Refuse, by layer and name, what would compute something else than the supernet.

    Raises:
        UnservableError: there is such a thing.
    """
    for layer, name, mixer in held_mixers(config):
        where = f"layer {layer}, {name}"
        cache_kind(mixer)
        _check_heads(where, mixer, ranks)
        if isinstance(mixer, AttentionConfig):
            rope = mixer.rope_parameters or config.rope_parameters or {}
            kind = rope.get("rope_type", "default")
            if kind in _CHANGING_ROPES:
                raise UnservableError(
                    f"{where} has the rotary embedding {kind!r}, which changes with the length of the text; "
                    "the vLLM plugin serves those that do not"
                )


def _check_heads(where: str, mixer: Any, ranks: int) -> None:  # noqa: ANN401
    counts = {"num_heads": mixer.num_heads}
    if isinstance(mixer, GatedDeltaNetConfig):
        counts["num_key_heads"] = mixer.num_key_heads
    for field, count in counts.items():
        if count % ranks:
            raise UnservableError(
                f"{where} has {field} {count}, which {ranks} tensor-parallel ranks cannot share; "
                "use a number of ranks that divides it"
            )
    if isinstance(mixer, AttentionConfig):
        heads = mixer.num_key_value_heads
        if heads % ranks and ranks % heads:
            raise UnservableError(
                f"{where} has {heads} key/value heads, which {ranks} tensor-parallel ranks can neither share "
                "nor repeat; use a number of ranks that divides them"
            )


def _aligned(size: int) -> int:
    return -(-size // PAGE_ALIGNMENT) * PAGE_ALIGNMENT

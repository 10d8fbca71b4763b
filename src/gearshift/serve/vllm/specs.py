"""What a cache group tells vLLM: one spec class for each kind, its identity being the group.

A spec's block is a super-page, whatever is on it. vLLM would merge layers with equal specs into one group and
then cut groups to equal lengths, which makes odd placements explode; every group here has a spec of its own,
so nothing is merged.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from vllm.v1.attention.backends.registry import MambaAttentionBackendEnum
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheSpec, MambaSpec, SlidingWindowSpec

from gearshift.serve.vllm.guards import expect_fields
from gearshift.slot_layout import Kind, SlotLayout

if TYPE_CHECKING:
    from vllm.config import VllmConfig

expect_fields(FullAttentionSpec, "block_size", "num_kv_heads", "head_size", "dtype")
expect_fields(SlidingWindowSpec, "sliding_window")
expect_fields(MambaSpec, "block_size", "shapes", "dtypes", "mamba_type", "num_speculative_blocks")


class _SlotSpec:
    """What the three kinds have in common."""

    layout: SlotLayout
    index: int
    kind: Kind

    @classmethod
    def merge(cls, specs: list[Any]) -> Any:  # noqa: ANN401
        """Groups are never merged; vLLM asks whether they could be, and takes an assertion for a no."""
        assert len(specs) == 1
        return specs[0]

    def is_uniform_with_collection(self, kv_cache_specs: dict[str, KVCacheSpec]) -> bool:
        """See `merge`."""
        return len(kv_cache_specs) == 1

    def max_memory_usage_bytes(self, vllm_config: VllmConfig) -> int:
        """The worst case of a request, counted once: vLLM adds up the groups, but no placement fills all."""
        if self.layout.group_names()[0] != (self.kind, self.index):
            return 0
        tokens, in_flight = vllm_config.model_config.max_model_len, vllm_config.max_in_flight_tokens
        return self.layout.worst_case_blocks(tokens, in_flight) * self.layout.block_bytes


@dataclass(frozen=True, kw_only=True)
class SlotFullSpec(_SlotSpec, FullAttentionSpec):
    """A group whose pages hold every token."""

    layout: SlotLayout
    index: int
    kind: Kind = "full"


@dataclass(frozen=True, kw_only=True)
class SlotWindowSpec(_SlotSpec, SlidingWindowSpec):
    """A group whose pages are given back when they leave the window."""

    layout: SlotLayout
    index: int
    kind: Kind = "window"


@dataclass(frozen=True, kw_only=True)
class SlotStateSpec(_SlotSpec, MambaSpec):
    """A group of which a request has one block, with a recurrent state for each of its layers there."""

    layout: SlotLayout
    index: int
    kind: Kind = "state"


def slot_spec(layout: SlotLayout, kind: Kind, index: int) -> SlotFullSpec | SlotWindowSpec | SlotStateSpec:
    """The spec of one group; its block is ``layout.block_bytes`` raw bytes."""
    common: dict[str, Any] = {"layout": layout, "index": index, "block_size": layout.block_tokens}
    if kind == "state":
        return SlotStateSpec(
            **common,
            shapes=((layout.block_bytes,),),
            dtypes=(torch.int8,),
            # vLLM prepares kernels for two types that it knows; this is neither.
            mamba_type=MambaAttentionBackendEnum.GDN_ATTN,
        )
    # vLLM counts keys and values: 2 * tokens * heads * channels bytes make up the block.
    channels = layout.block_bytes // (2 * layout.block_tokens)
    common |= {"num_kv_heads": 1, "head_size": channels, "dtype": torch.int8}
    if kind == "full":
        return SlotFullSpec(**common)
    return SlotWindowSpec(**common, sliding_window=layout.window)


@functools.cache
def covering(spec: Any, tokens: int) -> Any:  # noqa: ANN401 - any of the three, and the same comes back
    """The spec as it is for a request in which a block of the group covers so many tokens."""
    return replace(spec, block_size=tokens)

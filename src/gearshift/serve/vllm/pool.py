"""The cache memory of a worker: one pool of super-pages, and each layer's view of its pages.

For every cache group there is a `SlotGroup`, which is no layer of the model: it only tells vLLM of the
group's spec, so that vLLM allocates the pool. All groups' blocks come from the same pool, and so every layer
sees all pages of its kind; the tables of `gearshift.serve.vllm.step` say which are whose.

Letters: P pages.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from vllm.model_executor.layers.attention_layer_base import AttentionLayerBase
from vllm.v1.attention.backend import (
    AttentionBackend,
    AttentionCGSupport,
    AttentionMetadataBuilder,
    CommonAttentionMetadata,
    MultipleOf,
)
from vllm.v1.kv_cache_interface import KVCacheSpec

from gearshift.serve.vllm.geometry import StateShape
from gearshift.serve.vllm.specs import SlotStateSpec, slot_spec
from gearshift.slot_layout import Kind, SlotLayout

if TYPE_CHECKING:
    from vllm.config import VllmConfig


class _NoBuilder(AttentionMetadataBuilder[Any]):
    """vLLM makes a builder for every group; the model state builds the metadata of the real layers."""

    _cudagraph_support = AttentionCGSupport.ALWAYS

    def __init__(self, *args: Any) -> None:  # noqa: ANN401 - vLLM's own is abstract
        super().__init__(*args)

    def build(
        self, common_prefix_len: int, common_attn_metadata: CommonAttentionMetadata, fast_build: bool = False
    ) -> Any:  # noqa: ANN401
        raise AssertionError("a slot group is never run")


class SlotBackend(AttentionBackend):
    """Lays a group's memory out as raw super-pages."""

    @staticmethod
    def get_name() -> str:
        """For messages."""
        return "GEARSHIFT_SLOTS"

    @staticmethod
    def get_impl_cls() -> Any:  # noqa: ANN401
        """There is none."""
        raise AssertionError("a slot group is never run")

    @staticmethod
    def get_builder_cls() -> type[AttentionMetadataBuilder[Any]]:
        """One that is never asked."""
        return _NoBuilder

    @staticmethod
    def get_supported_kernel_block_sizes() -> list[int | MultipleOf]:
        """Any: no kernel reads these."""
        return [MultipleOf(1)]

    @staticmethod
    def get_kv_cache_shape(
        num_blocks: int,
        block_size: int,
        num_kv_heads: int,
        head_size: int,
        cache_dtype_str: str = "auto",
    ) -> tuple[int, ...]:
        """Blocks of bytes."""
        return num_blocks, 2 * block_size * num_kv_heads * head_size


class SlotGroup(AttentionLayerBase):
    """What vLLM takes for a layer with a cache; one for each group."""

    def __init__(self, vllm_config: VllmConfig, layout: SlotLayout, kind: Kind, index: int) -> None:
        self.layout, self.index = layout, index
        self.kind: Kind = kind
        self.kv_cache: Any = torch.tensor([])
        # A number is wanted in the name; of several, vLLM would not know which is the layer's.
        self.name = f"slots.{index}.{kind}"
        vllm_config.compilation_config.static_forward_context[self.name] = self

    def get_attn_backend(self) -> type[AttentionBackend]:
        """See `SlotBackend`."""
        return SlotBackend

    def get_kv_cache_spec(self, vllm_config: VllmConfig) -> KVCacheSpec:
        """The group's."""
        spec = slot_spec(self.layout, self.kind, self.index)
        if isinstance(spec, SlotStateSpec) and not vllm_config.cache_config.enable_prefix_caching:
            # Without prefixes vLLM's table of a state has one column, but it looks up every token there.
            columns = -(-vllm_config.model_config.max_model_len // spec.block_size)
            return replace(spec, num_speculative_blocks=columns)
        return spec

    def pool(self) -> Tensor:
        """All super-pages, as bytes; the same memory whichever group is asked."""
        cache = self.kv_cache[0] if isinstance(self.kv_cache, list | tuple) else self.kv_cache
        return torch.empty(0, dtype=torch.int8, device=cache.device).set_(cache.untyped_storage())


def page_count(pool: Tensor, layout: SlotLayout, kind: Kind) -> int:
    """How many pages of a kind the pool has."""
    return pool.numel() // layout.block_bytes * layout[kind].slots


def attention_pages(
    pool: Tensor,
    layout: SlotLayout,
    kind: Kind,
    shape: tuple[int, ...],
    order: tuple[int, ...],
    dtype: torch.dtype,
) -> Tensor:
    """All pages of a kind in the form that an attention backend wants.

    Args:
        pool: from `SlotGroup.pool`.
        layout: the cut.
        kind: ``full`` or ``window``.
        shape: the backend's shape, pages first.
        order: the order in memory of its dimensions.
        dtype: of keys and values.
    """
    assert order[0] == 0, "a backend that does not keep the pages outermost cannot share them"
    inner = torch.empty([shape[axis] for axis in order[1:]], device="meta")
    strides = [0] * len(shape)
    strides[0] = layout[kind].page_bytes // dtype.itemsize
    for axis, stride in zip(order[1:], inner.stride(), strict=True):
        strides[axis] = stride
    return torch.as_strided(pool.view(dtype), shape, strides)


def state_pages(
    pool: Tensor, layout: SlotLayout, shape: StateShape, memory: torch.dtype, inputs: torch.dtype
) -> tuple[Tensor, Tensor]:
    """All states of one shape: memories (P, H, V, K) and the convolutions' inputs (P, C, taps - 1)."""
    pages, stride = page_count(pool, layout, "state"), layout["state"].page_bytes
    memories = torch.as_strided(
        pool.view(memory),
        (pages, shape.heads, shape.value_dim, shape.key_dim),
        (stride // memory.itemsize, shape.value_dim * shape.key_dim, shape.key_dim, 1),
    )
    last_inputs = torch.as_strided(
        pool.view(inputs),
        (pages, shape.channels, shape.taps - 1),
        (stride // inputs.itemsize, shape.taps - 1, 1),
        shape.inputs_offset(memory) // inputs.itemsize,
    )
    return memories, last_inputs

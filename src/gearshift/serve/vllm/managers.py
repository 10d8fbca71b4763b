"""The block managers of the three kinds of group.

How many tokens a block covers depends on the request (see `gearshift.slot_layout`), which vLLM's
managers do not know. They read it from ``block_size`` at every call, so `at` sets that first.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Self

from vllm.v1.core.kv_cache_utils import KVCacheBlock
from vllm.v1.core.single_type_kv_cache_manager import (
    FullAttentionManager,
    SingleTypeKVCacheManager,
    SlidingWindowManager,
    register_all_kvcache_specs,
)
from vllm.v1.kv_cache_interface import FullAttentionSpec, MambaSpec, SlidingWindowSpec
from vllm.v1.kv_cache_spec_registry import KVCacheSpecRegistry
from vllm.v1.request import Request

from gearshift.serve.vllm.guards import expect_attributes, expect_signature
from gearshift.serve.vllm.specs import SlotFullSpec, SlotStateSpec, SlotWindowSpec

expect_signature(
    SingleTypeKVCacheManager.get_num_blocks_to_allocate,
    "self",
    "request_id",
    "num_tokens",
    "new_computed_blocks",
    "total_computed_tokens",
    "num_local_computed_tokens",
    "num_tokens_main_model",
    "apply_admission_cap",
)
expect_signature(
    SingleTypeKVCacheManager.allocate_new_blocks, "self", "request_id", "num_tokens", "num_tokens_main_model"
)
expect_signature(
    SingleTypeKVCacheManager.add_local_computed_blocks,
    "self",
    "request_id",
    "new_computed_blocks",
    "num_local_computed_tokens",
    "num_external_computed_tokens",
)
expect_signature(SingleTypeKVCacheManager.cache_blocks, "self", "request", "num_tokens", "retention_interval")
expect_signature(
    SingleTypeKVCacheManager.find_longest_cache_hit,
    "block_hashes",
    "max_length",
    "kv_cache_group_ids",
    "block_pool",
    "kv_cache_spec",
    "drop_eagle_block",
    "alignment_tokens",
)
expect_attributes(SingleTypeKVCacheManager, "remove_skipped_blocks", "pop_blocks_for_free", "free")


class _SlotManager(SingleTypeKVCacheManager):
    """What the kinds have in common."""

    def at(self, block_tokens: int) -> Self:
        """This manager, for a request in which a block covers so many tokens."""
        self.block_size = block_tokens
        return self

    @classmethod
    def reachable_block_mask(cls, *args: Any, **kwargs: Any) -> None:  # noqa: ANN401
        """Every full block may serve a later request."""
        return

    def get_num_common_prefix_blocks(self, running_request_id: str) -> int:
        """Nothing is known to be common to all requests: they differ in their placements."""
        return 0


class _AttentionSlotManager(_SlotManager):
    def __init__(self, *args: Any, needs_kv_cache_zeroing: bool = False, **kwargs: Any) -> None:  # noqa: ANN401
        super().__init__(*args, needs_kv_cache_zeroing=needs_kv_cache_zeroing, **kwargs)
        # vLLM goes by the exact class of the spec. A page that held a state may hold NaN for attention, and
        # kernels multiply what they mask by zero.
        self._record_new_block_ids = needs_kv_cache_zeroing


class SlotFullManager(_AttentionSlotManager, FullAttentionManager):
    """Keeps every block until the request ends."""

    def cache_blocks(self, request: Request, num_tokens: int, retention_interval: int | None = None) -> None:
        """Only full blocks; the half-filled tail that vLLM would offer as well needs a copy of the block."""
        SingleTypeKVCacheManager.cache_blocks(self, request, num_tokens, retention_interval)


class SlotWindowManager(_AttentionSlotManager, SlidingWindowManager):
    """Gives blocks back when they leave the window."""


class SlotStateManager(_SlotManager):
    """Exactly one block a request, and no prefix is found again.

    The states at the end of a prefix would have to be kept for that; see the docstring of the coordinator.
    """

    def get_num_blocks_to_allocate(self, request_id: str, *args: Any, **kwargs: Any) -> int:  # noqa: ANN401
        """One block at first, none later."""
        return 0 if self.req_to_blocks.get(request_id) else 1

    def allocate_new_blocks(
        self, request_id: str, num_tokens: int, num_tokens_main_model: int
    ) -> list[KVCacheBlock]:
        """Take the one block if it is not there."""
        held = self.req_to_blocks[request_id]
        if held:
            return []
        held += self.block_pool.get_new_blocks(1)
        return list(held)

    def allocate_external_computed_blocks(
        self, request_id: str, num_local_computed_tokens: int, num_external_computed_tokens: int
    ) -> None:
        """The one block does."""

    def cache_blocks(self, request: Request, num_tokens: int, retention_interval: int | None = None) -> None:
        """A state changes with every token: it is never a finished block."""

    @classmethod
    def find_longest_cache_hit(
        cls,
        *args: Any,  # noqa: ANN401
        kv_cache_group_ids: Sequence[int],
        **kwargs: Any,  # noqa: ANN401
    ) -> tuple[tuple[list[KVCacheBlock], ...], int]:
        """Nothing."""
        return tuple([] for _ in kv_cache_group_ids), 0


def register_specs() -> None:
    """Make specs and managers known to vLLM; may be called again."""
    register_all_kvcache_specs(None)
    for spec, manager, base in (
        (SlotFullSpec, SlotFullManager, FullAttentionSpec),
        (SlotWindowSpec, SlotWindowManager, SlidingWindowSpec),
        (SlotStateSpec, SlotStateManager, MambaSpec),
    ):
        KVCacheSpecRegistry.register(spec, manager, uniform_type_base_spec=base)

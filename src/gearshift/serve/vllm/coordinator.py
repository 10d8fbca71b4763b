"""The cache coordinator: a request allocates, caches and frees only the groups that its placement needs.

vLLM's own coordinators walk all groups for every request. This one knows each request's shares and walks only
those; a decoding request whose next token fits into the blocks it has costs one comparison.

Prefixes: block hashes are salted with the placement (`gearshift.serve.vllm.scheduler`), so blocks are found
by the same placement only. A placement with recurrent layers finds none: its states after a prefix are not
kept. Keeping them at chunk ends is possible in this design, and is to be measured first.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

import vllm.v1.core.kv_cache_manager as kv_cache_manager_module
from vllm.v1.core.kv_cache_coordinator import KVCacheCoordinator, get_kv_cache_coordinator
from vllm.v1.core.kv_cache_utils import BlockHash, KVCacheBlock
from vllm.v1.request import Request

from gearshift.serve.vllm.guards import expect_attributes, expect_signature
from gearshift.serve.vllm.managers import SlotFullManager, SlotStateManager, SlotWindowManager
from gearshift.serve.vllm.specs import covering
from gearshift.slot_layout import Share, SlotLayout

SlotManager = SlotFullManager | SlotWindowManager | SlotStateManager
Blocks = tuple[list[KVCacheBlock], ...]

_FACTORY = (
    "kv_cache_config",
    "max_model_len",
    "max_in_flight_tokens",
    "use_eagle",
    "enable_caching",
    "enable_kv_cache_events",
)
expect_signature(get_kv_cache_coordinator, *_FACTORY)
expect_signature(KVCacheCoordinator.__init__, "self", *_FACTORY)
expect_signature(
    KVCacheCoordinator.get_num_blocks_to_allocate,
    "self",
    "request_id",
    "num_tokens",
    "new_computed_blocks",
    "num_encoder_tokens",
    "total_computed_tokens",
    "num_local_computed_tokens",
    "num_tokens_main_model",
    "apply_admission_cap",
)
expect_signature(
    KVCacheCoordinator.allocate_new_blocks,
    "self",
    "request_id",
    "num_tokens",
    "num_tokens_main_model",
    "num_encoder_tokens",
)
expect_signature(KVCacheCoordinator.find_longest_cache_hit, "self", "block_hashes", "max_cache_hit_length")
expect_attributes(kv_cache_manager_module, "get_kv_cache_coordinator")


class PlacedHashes(list[BlockHash]):
    """A request's block hashes, which remember whose they are: vLLM asks for hits with nothing but these."""

    shares: tuple[GroupShare, ...] = ()


@dataclass(frozen=True)
class GroupShare:
    """One group of a request, by its number in vLLM, and the tokens that one of its blocks covers there."""

    group: int
    block_tokens: int


class SlotCoordinator(KVCacheCoordinator):
    """See the module's docstring. Takes the arguments of vLLM's coordinators."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:  # noqa: ANN401
        super().__init__(*args, **kwargs)
        specs = [group.kv_cache_spec for group in self.kv_cache_config.kv_cache_groups]
        self.layout: SlotLayout = cast(Any, specs[0]).layout
        self._numbers = {(cast(Any, s).kind, cast(Any, s).index): i for i, s in enumerate(specs)}
        self._managers = cast(tuple[SlotManager, ...], self.single_type_managers)
        self._shares: dict[str, tuple[GroupShare, ...]] = {}
        # Tokens for which a running request has blocks in all of its groups.
        self._room: dict[str, int] = {}

    def group_shares(self, shares: Sequence[Share]) -> tuple[GroupShare, ...]:
        """These shares with the group numbers of this engine."""
        return tuple(GroupShare(self._numbers[s.kind, s.group], s.block_tokens) for s in shares)

    def admit(self, request_id: str, shares: tuple[GroupShare, ...]) -> None:
        """Learn which groups a request needs, before anything is allocated for it."""
        self._shares[request_id] = shares

    def forget(self, request_id: str) -> None:
        """The request has ended and its blocks were freed."""
        self._shares.pop(request_id, None)

    def blocks_held(self, request_id: str) -> int:
        """Super-pages that a request holds at present."""
        lists = (self._managers[s.group].req_to_blocks.get(request_id, []) for s in self._shares[request_id])
        return sum(not block.is_null for blocks in lists for block in blocks)

    def _active(self, request_id: str) -> Iterator[tuple[int, SlotManager]]:
        for share in self._shares.get(request_id, ()):
            yield share.group, self._managers[share.group].at(share.block_tokens)

    def get_num_blocks_to_allocate(
        self,
        request_id: str,
        num_tokens: int,
        new_computed_blocks: tuple[Sequence[KVCacheBlock], ...],
        num_encoder_tokens: int,
        total_computed_tokens: int,
        num_local_computed_tokens: int,
        num_tokens_main_model: int,
        apply_admission_cap: bool = False,
    ) -> int:
        """See vLLM's."""
        if num_tokens <= self._room.get(request_id, 0):
            return 0
        return sum(
            manager.get_num_blocks_to_allocate(
                request_id,
                num_tokens,
                new_computed_blocks[group],
                total_computed_tokens,
                num_local_computed_tokens,
                num_tokens_main_model,
                apply_admission_cap=apply_admission_cap,
            )
            for group, manager in self._active(request_id)
        )

    def allocate_new_computed_blocks(
        self,
        request_id: str,
        new_computed_blocks: tuple[Sequence[KVCacheBlock], ...],
        num_local_computed_tokens: int,
        num_external_computed_tokens: int,
    ) -> None:
        """See vLLM's; a running request has them already. What was found is held before more is taken."""
        local, external = num_local_computed_tokens, num_external_computed_tokens
        new = [
            (group, manager)
            for group, manager in self._active(request_id)
            if request_id not in manager.num_cached_block
        ]
        for group, manager in new:
            manager.add_local_computed_blocks(request_id, new_computed_blocks[group], local, external)
        for _, manager in new:
            if external:
                manager.allocate_external_computed_blocks(request_id, local, external)

    def allocate_new_blocks(
        self, request_id: str, num_tokens: int, num_tokens_main_model: int, num_encoder_tokens: int = 0
    ) -> Blocks:
        """See vLLM's."""
        new: Blocks = tuple([] for _ in self._managers)
        if num_tokens <= self._room.get(request_id, 0):
            return new
        covered = []
        for group, manager in self._active(request_id):
            new[group].extend(manager.allocate_new_blocks(request_id, num_tokens, num_tokens_main_model))
            if not isinstance(manager, SlotStateManager):
                covered.append(len(manager.req_to_blocks[request_id]) * manager.block_size)
        self._room[request_id] = min(covered, default=self.max_model_len)
        return new

    def cache_blocks(self, request: Request, num_computed_tokens: int) -> None:
        """See vLLM's."""
        for _, manager in self._active(request.request_id):
            manager.cache_blocks(request, num_computed_tokens)

    def remove_skipped_blocks(
        self, request_id: str, processed_computed_tokens: int, num_prompt_tokens: int | None = None
    ) -> None:
        """See vLLM's."""
        for _, manager in self._active(request_id):
            if isinstance(manager, SlotWindowManager):
                manager.remove_skipped_blocks(request_id, processed_computed_tokens, num_prompt_tokens)

    def free(self, request_id: str) -> None:
        """See vLLM's. The shares stay known: a preempted request comes back."""
        self._room.pop(request_id, None)
        for _, manager in self._active(request_id):
            manager.free(request_id)

    def pop_blocks_for_free(self, request_id: str) -> list[KVCacheBlock]:
        """See vLLM's."""
        self._room.pop(request_id, None)
        taken = [manager.pop_blocks_for_free(request_id) for _, manager in self._active(request_id)]
        return [block for blocks in taken for block in blocks]

    def get_num_common_prefix_blocks(self, running_request_id: str) -> list[int]:
        """None: see the managers."""
        return [0] * len(self._managers)

    def new_step_starts(self) -> None:
        """Nothing to do."""

    def find_longest_cache_hit(
        self, block_hashes: list[BlockHash], max_cache_hit_length: int
    ) -> tuple[Blocks, int, int]:
        """The longest prefix that is cached in all groups of the request.

        A window's hit depends on where it ends, so the groups are asked again until all agree.
        """
        found: Blocks = tuple([] for _ in self._managers)
        shares = block_hashes.shares if isinstance(block_hashes, PlacedHashes) else ()
        if not shares or not self.enable_caching or any(self._is_state(share) for share in shares):
            return found, 0, 0
        alignment = math.lcm(*(share.block_tokens for share in shares))
        length, before = max_cache_hit_length // alignment * alignment, -1
        while length != before:
            before = length
            for share in shares:
                blocks, length = self._hit(share, block_hashes, length, alignment)
                found[share.group][:] = blocks
        return found, length, 0

    def _is_state(self, share: GroupShare) -> bool:
        return isinstance(self._managers[share.group], SlotStateManager)

    def _hit(
        self, share: GroupShare, block_hashes: list[BlockHash], length: int, alignment: int
    ) -> tuple[list[KVCacheBlock], int]:
        manager = self._managers[share.group]
        (blocks,), found = manager.find_longest_cache_hit(
            block_hashes=block_hashes,
            max_length=length,
            kv_cache_group_ids=[share.group],
            block_pool=self.block_pool,
            kv_cache_spec=covering(manager.kv_cache_spec, share.block_tokens),
            drop_eagle_block=False,
            alignment_tokens=alignment,
        )
        return blocks, found


@contextmanager
def slot_coordinators() -> Iterator[None]:
    """While this lasts, vLLM's cache managers get a coordinator of this class.

    The one thing for which vLLM has no hook: the choice is made inside the constructor of its scheduler.
    """
    module = cast(Any, kv_cache_manager_module)
    original = module.get_kv_cache_coordinator
    module.get_kv_cache_coordinator = SlotCoordinator
    try:
        yield
    finally:
        module.get_kv_cache_coordinator = original

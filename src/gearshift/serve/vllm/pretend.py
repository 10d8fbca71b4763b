"""Prompts that count as computed, so that decoding at long contexts can be timed without prompts."""

from __future__ import annotations

from typing import Any

from vllm.distributed.kv_transfer.kv_connector.v1.base import SupportsHMA
from vllm.v1.request import Request


class PretendPrefilled(SupportsHMA):
    """Tells vLLM's scheduler, in the manner of a KV connector, that somebody has filled the cache.

    Nobody has: the pages hold whatever they held. It has no part on the workers.
    """

    def get_num_new_matched_tokens(self, request: Request, num_computed_tokens: int) -> tuple[int, bool]:
        """All but the last token, at once."""
        return max(0, request.num_tokens - 1 - num_computed_tokens), False

    def request_finished_all_groups(self, request: Request, block_ids: Any) -> tuple[bool, None]:  # noqa: ANN401
        """The blocks are free."""
        return False, None

    def has_pending_push_work(self) -> bool:
        """Never."""
        return False

    def take_events(self) -> tuple[()]:
        """None."""
        return ()

    def __getattr__(self, name: str) -> Any:  # noqa: ANN401 - whatever vLLM tells a connector
        """Everything else that a connector is told is of no interest."""
        if name.startswith("__"):
            raise AttributeError(name)
        return lambda *_args, **_kwargs: None

"""The scheduler: every request has a placement, and a step mixes as many placements as it is allowed to."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.core.sched.request_queue import RequestQueue, create_request_queue
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.request import Request, RequestStatus

from gearshift.errors import GearshiftError
from gearshift.serve.vllm.coordinator import PlacedHashes, SlotCoordinator, slot_coordinators
from gearshift.serve.vllm.guards import expect_attributes, expect_signature
from gearshift.serve.vllm.options import Options
from gearshift.serve.vllm.placements import PlacedLayers, PlacementTable
from gearshift.serve.vllm.policy import TurnPolicy
from gearshift.serve.vllm.pretend import PretendPrefilled
from gearshift.supernet.config import SupernetConfig

logger = logging.getLogger(__name__)

expect_signature(Scheduler.schedule, "self", "throttle_prefills")
expect_signature(Scheduler.add_request, "self", "request")
expect_signature(Scheduler._free_blocks, "self", "request")
expect_attributes(AsyncScheduler, "_update_after_schedule")
expect_attributes(Request, "update_block_hashes")


class PlacementScheduler(AsyncScheduler):
    """vLLM's scheduler for requests with placements; takes its arguments."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:  # noqa: ANN401
        with slot_coordinators():
            super().__init__(*args, **kwargs)
        coordinator = self.kv_cache_manager.coordinator
        assert isinstance(coordinator, SlotCoordinator)
        self.coordinator = coordinator
        config = self.vllm_config.model_config.hf_config
        assert isinstance(config, SupernetConfig)
        self.placements = PlacementTable(config, coordinator.layout)
        self.placed: dict[str, PlacedLayers] = {}
        options = Options.read(self.vllm_config.additional_config)
        self.turns = TurnPolicy(options.max_placements_per_step)
        if options.pretend_prefilled:
            self.connector: Any = PretendPrefilled()
        self._salt = _checkpoint_stamp(self.vllm_config)

    def add_request(self, request: Request) -> None:
        """See vLLM's. Never raises for what a user asked: that would end the engine."""
        if request.request_id not in self.requests:
            self._place(request)
        super().add_request(request)

    def _place(self, request: Request) -> None:
        params = request.sampling_params
        try:
            placed = self.placements.of_extra_args(None if params is None else params.extra_args)
        except GearshiftError as error:
            # The front end lets no such request through; offline, the request ends with an error.
            logger.error("request %s: %s", request.request_id, error)
            placed = self.placements.default
            self.grammar_compile_error_reqs.add(request.request_id)
        self.placed[request.request_id] = placed
        shares = self.coordinator.group_shares(placed.shares)
        self.coordinator.admit(request.request_id, shares)
        # A prefix is found again by the same placement of the same checkpoint only, and by the user's salt.
        request.cache_salt = f"{self._salt}|{placed.placement}|{request.cache_salt or ''}"
        request.block_hashes = PlacedHashes()
        request.block_hashes.shares = shares
        request.update_block_hashes()

    def _free_blocks(self, request: Request) -> None:
        super()._free_blocks(request)
        self.coordinator.forget(request.request_id)
        self.placed.pop(request.request_id, None)

    def schedule(self, throttle_prefills: bool = False) -> SchedulerOutput:
        """See vLLM's. Requests of placements whose turn it is not are out of its sight for this step."""
        turn = self.turns.choose(self._number(request) for request in self._in_order())
        if turn is None:
            return super().schedule(throttle_prefills)

        def waits(request: Request) -> bool:
            return self._number(request) not in turn

        for request in filter(waits, self.running):
            # vLLM's own way to leave a running request out of a step; `schedule` counts the step up first.
            request.next_decode_eligible_step = max(request.next_decode_eligible_step, self.current_step + 2)
        waiting = self._take_out("waiting", waits)
        skipped = self._take_out("skipped_waiting", waits)
        output = super().schedule(throttle_prefills)
        self._put_back("waiting", waiting)
        self._put_back("skipped_waiting", skipped)
        return output

    def _number(self, request: Request) -> int:
        return self.placed[request.request_id].number

    def _in_order(self) -> list[Request]:
        """Every request that could run, the oldest first."""
        everyone = [*self.running, *self.waiting, *self.skipped_waiting]
        return sorted(everyone, key=lambda request: request.arrival_time)

    def _take_out(self, queue: str, which: Callable[[Request], bool]) -> list[Request]:
        """Remove some requests from a queue of vLLM's; returns them in its order."""
        found: list[Request] = list(getattr(self, queue))
        taken = [request for request in found if which(request)]
        if taken:
            setattr(self, queue, self._queue_of([request for request in found if not which(request)]))
        return taken

    def _put_back(self, queue: str, taken: list[Request]) -> None:
        """Let requests in again at their places: the preempted ones first, then by arrival."""
        if not taken:
            return
        everyone = [*getattr(self, queue), *taken]
        everyone.sort(key=lambda r: (r.status != RequestStatus.PREEMPTED, r.arrival_time))
        setattr(self, queue, self._queue_of(everyone))

    def _queue_of(self, requests: list[Request]) -> RequestQueue:
        queue = create_request_queue(self.policy)
        for request in requests:
            queue.add_request(request)
        return queue


def _checkpoint_stamp(vllm_config: Any) -> str:  # noqa: ANN401 - vLLM's
    """Names the weights and the cache's dtype as far as an engine can confuse them.

    The digest of all weights would take a minute to read; the files' sizes and times change with them.
    """
    model, digest = vllm_config.model_config, hashlib.sha256()
    directory = Path(model.model)
    parts = [str(directory), str(model.revision), str(model.dtype), vllm_config.cache_config.cache_dtype]
    parts += [cast(SupernetConfig, model.hf_config).to_json_string()]
    for path in sorted(directory.glob("*.safetensors")):
        status = path.stat()
        parts.append(f"{path.name} {status.st_size} {status.st_mtime_ns}")
    digest.update("\n".join(parts).encode())
    return digest.hexdigest()[:16]

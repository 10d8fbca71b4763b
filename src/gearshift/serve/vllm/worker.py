"""vLLM's worker with CUDA graphs by placement.

vLLM's graph manager keeps a graph for each number of active LoRAs, of which this plugin has none: it counts
the placements that have graphs instead.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, cast

import torch
import vllm.v1.worker.gpu.model_runner as model_runner_module
from torch import Tensor
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.kv_cache_interface import KVCacheConfig
from vllm.v1.worker.gpu.cudagraph_utils import BatchExecutionDescriptor, ModelCudaGraphManager
from vllm.v1.worker.gpu.model_runner import GPUModelRunner
from vllm.v1.worker.gpu_worker import Worker

from gearshift.serve.vllm.guards import expect_attributes, expect_signature
from gearshift.serve.vllm.options import Options
from gearshift.serve.vllm.state import PlacementModelState

# Under the name that vLLM shows.
logger = logging.getLogger(f"vllm.{__name__}")

expect_signature(
    ModelCudaGraphManager.__init__,
    "self",
    "vllm_config",
    "device",
    "cudagraph_mode",
    "decode_query_len",
    "lora_capture_cases",
)
expect_signature(
    ModelCudaGraphManager.dispatch,
    "self",
    "num_reqs",
    "num_tokens",
    "uniform_token_count",
    "num_active_loras",
)
expect_signature(
    GPUModelRunner.execute_model, "self", "scheduler_output", "intermediate_tensors", "dummy_run"
)
expect_attributes(model_runner_module, "GPUModelRunner", "ModelCudaGraphManager")


class _BudgetSpent(Exception):  # noqa: N818 - it ends the capture, and is no error
    """What graphs may cost has been spent."""


class PlacementGraphs(ModelCudaGraphManager):
    """The graphs of every placement that has some; takes vLLM's arguments and the model's state."""

    def __init__(self, *args: Any, state: PlacementModelState) -> None:  # noqa: ANN401
        super().__init__(*args, lora_capture_cases=list(range(1, state.graph_count + 1)))
        self._state = state
        self._options = Options.read(self.vllm_config.additional_config)
        for descriptors in self._capture_descs.values():
            # All sizes of one placement, then the next: when the budget ends, the first presets have theirs.
            descriptors.sort(key=lambda d: (d.num_active_loras, -d.num_tokens))

    def dispatch(
        self, num_reqs: int, num_tokens: int, uniform_token_count: int | None, num_active_loras: int
    ) -> BatchExecutionDescriptor:
        """See vLLM's; the number of LoRAs is replaced by that of the step's placement."""
        number = self._state.graph_number()
        chosen = super().dispatch(num_reqs, num_tokens, uniform_token_count, number)
        if chosen in self.graphs or number == 0:
            return chosen
        return super().dispatch(num_reqs, num_tokens, uniform_token_count, 0)

    def capture(self, *args: Any, **kwargs: Any) -> None:  # noqa: ANN401
        """See vLLM's. Ends when the budget is spent; steps whose graph is missing run without one."""
        begun, free = time.monotonic(), _free_memory()

        def next_graph(number: int, requests: int, tokens: int) -> None:
            seconds, memory = time.monotonic() - begun, free - _free_memory()
            if seconds > self._options.graph_seconds or memory > self._options.graph_bytes:
                raise _BudgetSpent
            self._state.capture_starts(number)

        kwargs["lora_capture_hook"] = next_graph
        try:
            super().capture(*args, **kwargs)
        except _BudgetSpent:
            self._graphs_captured = True
        wanted = sum(len(descriptors) for descriptors in self._capture_descs.values())
        logger.info(
            "captured %d of %d CUDA graphs for %d placements in %.0f s and %.2f GB",
            len(self.graphs),
            wanted,
            self._state.graph_count,
            time.monotonic() - begun,
            (free - _free_memory()) / 1e9,
        )


def _free_memory() -> int:
    return torch.cuda.mem_get_info()[0] if torch.cuda.is_available() else 0


class PlacementRunner(GPUModelRunner):
    """vLLM's model runner, which tells the model's state what each step runs."""

    graphs_class: type[PlacementGraphs] = PlacementGraphs

    def initialize_kv_cache(self, kv_cache_config: KVCacheConfig) -> None:
        """See vLLM's."""
        super().initialize_kv_cache(kv_cache_config)
        assert self.cudagraph_manager is not None
        self.cudagraph_manager = self.graphs_class(
            self.vllm_config,
            self.device,
            self.cudagraph_manager.cudagraph_mode,
            self.decode_query_len,
            state=self._placements,
        )

    def execute_model(
        self,
        scheduler_output: SchedulerOutput,
        intermediate_tensors: Any = None,  # noqa: ANN401 - refused with pipeline parallelism
        dummy_run: bool = False,
        *args: Any,  # noqa: ANN401
        **kwargs: Any,  # noqa: ANN401
    ) -> Any:  # noqa: ANN401
        """See vLLM's."""
        self._placements.step_starts(None if dummy_run else scheduler_output)
        return super().execute_model(scheduler_output, intermediate_tensors, dummy_run, *args, **kwargs)

    @property
    def _placements(self) -> PlacementModelState:
        return cast(PlacementModelState, self.model_state)


@contextmanager
def runners(runner: Callable[..., Any]) -> Iterator[None]:
    """While this lasts, vLLM's workers get this model runner; they choose it inside their `init_device`."""
    module = cast(Any, model_runner_module)
    original = module.GPUModelRunner
    module.GPUModelRunner = runner
    try:
        yield
    finally:
        module.GPUModelRunner = original


class CacheFiller:
    """What a worker can do for measurements without prompts."""

    model_runner: Any

    def fill_cache(self, seed: int) -> None:
        """Random numbers everywhere in the cache."""
        pool: Tensor = self.model_runner.model.slot_groups[0].pool().view(self.model_runner.dtype)
        generator = torch.Generator(pool.device).manual_seed(seed)
        for part in pool.split(1 << 28):
            part.normal_(std=0.1, generator=generator)


class PlacementWorker(CacheFiller, Worker):
    """A GPU's worker."""

    def init_device(self) -> None:
        """See vLLM's."""
        with runners(PlacementRunner):
            super().init_device()

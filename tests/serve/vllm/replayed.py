"""CUDA graphs without a GPU: a "graph" remembers what it was captured for, and runs the model on replay.

As a graph does, it sees nothing but what lies in vLLM's buffers when it is replayed, at the sizes that it was
captured for. Only the attention backend's metadata is made anew: the one for CPUs reads lengths on the host.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from vllm.config.compilation import CUDAGraphMode
from vllm.forward_context import set_forward_context
from vllm.v1.worker.cpu.model_runner import CPUModelRunner
from vllm.v1.worker.cpu_worker import CPUWorker
from vllm.v1.worker.gpu.cudagraph_utils import BatchExecutionDescriptor

from gearshift.serve.vllm.worker import CacheFiller, PlacementGraphs, PlacementRunner

SIZES = [2, 4]


class Replay:
    def __init__(self, graphs: ReplayedGraphs, descriptor: BatchExecutionDescriptor) -> None:
        self.graphs, self.descriptor, self.count = graphs, descriptor, 0

    def replay(self) -> None:
        self.count += 1
        runner, requests = self.graphs.runner, self.descriptor.num_reqs
        assert requests is not None and requests == self.descriptor.num_tokens
        buffers = runner.input_buffers
        batch: Any = SimpleNamespace(
            num_reqs=requests,
            num_tokens=requests,
            seq_lens=buffers.seq_lens[:requests],
            query_start_loc=buffers.query_start_loc[: requests + 1],
            positions=buffers.positions[:requests],
        )
        tables = runner.block_tables.get_dummy_block_tables(requests)
        state = runner.model_state
        state.capture_starts(self.descriptor.num_active_loras)
        metadata = state.prepare_attn(
            batch, CUDAGraphMode.NONE, tables, None, None, runner.kv_cache_config, for_capture=True
        )
        with set_forward_context(metadata, runner.vllm_config, num_tokens=requests, slot_mapping={}):
            hidden = runner.model(buffers.input_ids[:requests], batch.positions)
        if self.graphs.hidden_states is None:
            self.graphs.hidden_states = torch.empty(max(SIZES), hidden.shape[1])
        # Rows that only fill the graph up are nobody's.
        self.graphs.hidden_states.fill_(float("nan"))
        self.graphs.hidden_states[:requests] = hidden


class ReplayedGraphs(PlacementGraphs):
    runner: Any

    def __init__(self, vllm_config: Any, device: Any, mode: Any, length: int, **kwargs: Any) -> None:
        vllm_config.compilation_config.cudagraph_capture_sizes = SIZES
        vllm_config.compilation_config.max_cudagraph_capture_size = max(SIZES)
        super().__init__(vllm_config, device, CUDAGraphMode.NONE, length, **kwargs)
        self.cudagraph_mode = CUDAGraphMode.FULL_DECODE_ONLY
        self._init_candidates()

    def capture_for(self, runner: Any) -> None:
        self.runner = runner
        for descriptor in self._capture_descs[CUDAGraphMode.FULL]:
            self.graphs[descriptor] = Replay(self, descriptor)  # pyright: ignore[reportArgumentType]
        self._graphs_captured = True

    @property
    def replays(self) -> dict[tuple[int, int], int]:
        """How often each graph ran, by placement and size."""
        return {(d.num_active_loras, d.num_tokens): graph.count for d, graph in self.graphs.items()}  # pyright: ignore[reportAttributeAccessIssue]


class ReplayedRunner(PlacementRunner, CPUModelRunner):
    graphs_class = ReplayedGraphs


class ReplayedWorker(CacheFiller, CPUWorker):
    def init_device(self) -> None:
        super().init_device()
        self.model_runner.__class__ = ReplayedRunner

    def compile_or_warm_up_model(self) -> Any:
        result = super().compile_or_warm_up_model()
        graphs: Any = self.model_runner.cudagraph_manager
        graphs.capture_for(self.model_runner)
        return result

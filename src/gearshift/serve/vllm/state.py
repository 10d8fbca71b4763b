"""The model state: told of every request by vLLM's model runner, it prepares every step of the model."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn
from vllm.config import set_current_vllm_config
from vllm.config.compilation import CUDAGraphMode
from vllm.v1.core.sched.output import NewRequestData, SchedulerOutput
from vllm.v1.kv_cache_interface import AttentionSpec, FullAttentionSpec, KVCacheConfig, SlidingWindowSpec
from vllm.v1.worker.gpu.input_batch import InputBatch
from vllm.v1.worker.gpu.model_states.default import DefaultModelState

from gearshift.errors import GearshiftError
from gearshift.serve.vllm.attention import AttentionMixer
from gearshift.serve.vllm.graphs import GraphPages
from gearshift.serve.vllm.guards import expect_signature
from gearshift.serve.vllm.metadata import MixedStep, StepMetadata, pure_step
from gearshift.serve.vllm.model import ServedSupernet, StepPlan
from gearshift.serve.vllm.placements import PlacedLayers, PlacementTable
from gearshift.serve.vllm.plugin import cache_types, graph_placements
from gearshift.serve.vllm.pool import attention_pages, page_count, state_pages
from gearshift.serve.vllm.step import PageTables
from gearshift.slot_layout import Kind

if TYPE_CHECKING:
    from vllm.config import VllmConfig

expect_signature(DefaultModelState.__init__, "self", "vllm_config", "model", "encoder_cache", "device")
expect_signature(DefaultModelState.add_request, "self", "req_index", "new_req_data")
expect_signature(DefaultModelState.remove_request, "self", "req_id")
expect_signature(
    DefaultModelState.prepare_attn,
    "self",
    "input_batch",
    "cudagraph_mode",
    "block_tables",
    "slot_mappings",
    "attn_groups",
    "kv_cache_config",
    "for_capture",
)


class PlacementModelState(DefaultModelState):
    """Knows the placement of every request that runs, and builds each layer's metadata from it."""

    def __init__(
        self,
        vllm_config: VllmConfig,
        model: nn.Module,
        encoder_cache: Any,  # noqa: ANN401 - vLLM's, for pictures
        device: torch.device,
    ) -> None:
        super().__init__(vllm_config, model, encoder_cache, device)
        assert isinstance(model, ServedSupernet)
        self._served = model
        self._placements = PlacementTable(model.config, model.layout)
        self._placed: list[PlacedLayers] = [self._placements.default] * self.max_num_reqs
        self._by_id: dict[str, PlacedLayers] = {}
        self._tables: PageTables | None = None
        self._builders: dict[str, Any] = {}
        self._graphs = [self._placements.look_up(text) for text in graph_placements(vllm_config)]
        self._graph_pages: GraphPages | None = None
        self._captured = 0
        # What graphs read has to stay where it is.
        self._held: dict[tuple[int, int], object] = {}
        self._scheduled: SchedulerOutput | None = None

    @property
    def graph_count(self) -> int:
        """How many placements have graphs of their own; `graph_number` counts them from 1."""
        return len(self._graphs)

    def add_request(self, req_index: int, new_req_data: NewRequestData) -> None:
        """A request starts, or comes back after it was preempted."""
        super().add_request(req_index, new_req_data)
        params = new_req_data.sampling_params
        try:
            placed = self._placements.of_extra_args(None if params is None else params.extra_args)
        except GearshiftError:
            # The scheduler has refused it already; what its one step computes is not looked at.
            placed = self._placements.default
        self._placed[req_index] = self._by_id[new_req_data.req_id] = placed

    def remove_request(self, req_id: str) -> None:
        """A request has ended, or was preempted."""
        super().remove_request(req_id)
        self._by_id.pop(req_id, None)

    def step_starts(self, scheduled: SchedulerOutput | None) -> None:
        """Learn what the next step runs; None for one of vLLM's own, without requests."""
        self._scheduled = scheduled

    def graph_number(self) -> int:
        """The graphs of the step's placement, counted from 1; 0 if it has several, or one without graphs."""
        scheduled = self._scheduled
        if scheduled is None or _has_first_tokens(scheduled):
            return 0
        placed = {id(p): p for p in (self._by_id[name] for name in scheduled.num_scheduled_tokens)}
        only = next(iter(placed.values()))
        return self._graphs.index(only) + 1 if len(placed) == 1 and only in self._graphs else 0

    def capture_starts(self, graph_number: int) -> None:
        """The next step to be prepared is for a graph of this placement."""
        self._captured = graph_number

    def prepare_attn(
        self,
        input_batch: InputBatch,
        cudagraph_mode: CUDAGraphMode,
        block_tables: tuple[Tensor, ...],
        slot_mappings: Tensor,
        attn_groups: Any,  # noqa: ANN401 - vLLM's groups, none of which is a layer
        kv_cache_config: KVCacheConfig,
        for_capture: bool = False,
    ) -> dict[str, Any]:
        """See vLLM's: metadata of every layer that this step runs, by its prefix."""
        if cudagraph_mode == CUDAGraphMode.FULL:
            return {}  # the graph reads vLLM's buffers
        if self._tables is None:
            # Backends ask for the configuration as it was when the model was made.
            with set_current_vllm_config(self.vllm_config):
                self._tables = self._open_pool(kv_cache_config)
        if for_capture:
            metadata, plan = self._pure_step(input_batch, block_tables, self._tables)
        else:
            placed = [self._placed[index] for index in input_batch.idx_mapping_np[: input_batch.num_reqs]]
            step = MixedStep(self._served, self._tables, self._builders, input_batch, placed)
            metadata, plan = step.metadata, step.plan(block_tables)
        self._served.plan = plan
        return metadata.by_layer

    def _pure_step(
        self, batch: InputBatch, block_tables: tuple[Tensor, ...], tables: PageTables
    ) -> tuple[StepMetadata, StepPlan]:
        layers = len(self._placements.default.placement)
        if self._graph_pages is None:
            self._graph_pages = GraphPages(
                self._served.layout, layers, self.max_num_reqs, self.max_model_len, self.device
            )
        step = pure_step(
            self._served,
            tables,
            self._graph_pages,
            self._builders,
            batch,
            self._graphs[self._captured - 1],
            block_tables,
            self.max_model_len,
        )
        self._held[self._captured, batch.num_reqs] = step
        return step

    def _open_pool(self, kv_cache_config: KVCacheConfig) -> PageTables:
        """Once, when the memory is there: give every layer its view of the pages, and make the builders."""
        pool, layout = self._served.slot_groups[0].pool(), self._served.layout
        types = cache_types(self.vllm_config)
        for mixer in self._served.delta_mixers():
            mixer.state_pages = state_pages(pool, layout, mixer.state_shape, types.memory, types.inputs)
        for layer in self._served.layers():
            for mixer in layer.mixers.values():
                if isinstance(mixer, AttentionMixer):
                    self._open_attention(mixer, pool)
        specs = [cast(Any, group.kv_cache_spec) for group in kv_cache_config.kv_cache_groups]
        return PageTables(layout, {(spec.kind, spec.index): i for i, spec in enumerate(specs)})

    def _open_attention(self, mixer: AttentionMixer, pool: Tensor) -> None:
        layer, layout, backend = mixer.attn, self._served.layout, mixer.attn.get_attn_backend()
        kind: Kind = "full" if mixer.window is None else "window"
        shape = backend.get_kv_cache_shape(
            page_count(pool, layout, kind), layout.block_tokens, layer.num_kv_heads, layer.head_size
        )
        try:
            order = backend.get_kv_cache_stride_order()
        except (AttributeError, NotImplementedError):  # as vLLM reads a backend without an order of its own
            order = tuple(range(len(shape)))
        layer.kv_cache = attention_pages(pool, layout, kind, shape, order, layer.kv_cache_torch_dtype)
        spec = _layer_spec(mixer, layout.block_tokens)
        key = f"{spec}"
        if key not in self._builders:
            builder = backend.get_builder_cls()
            self._builders[key] = builder(spec, [layer.layer_name], self.vllm_config, self.device)
            # One schedule would be kept for all layers and rows of a step, and these differ here.
            self._builders[key].aot_schedule = False
        self._builders[layer.layer_name] = self._builders[key]


def _layer_spec(mixer: AttentionMixer, block_tokens: int) -> AttentionSpec:
    """A layer's cache as its own backend knows it; layers with equal ones share a builder."""
    layer = mixer.attn
    common: dict[str, Any] = {
        "block_size": block_tokens,
        "num_kv_heads": layer.num_kv_heads,
        "head_size": layer.head_size,
        "dtype": layer.kv_cache_torch_dtype,
    }
    if mixer.window is None:
        return FullAttentionSpec(**common)
    return SlidingWindowSpec(**common, sliding_window=mixer.window)


def _has_first_tokens(scheduled: SchedulerOutput) -> bool:
    """Whether a request has nothing in the cache yet: its states are rubbish, which no graph clears."""
    new = (request.num_computed_tokens for request in scheduled.scheduled_new_reqs)
    return not all(new) or not all(scheduled.scheduled_cached_reqs.num_computed_tokens)

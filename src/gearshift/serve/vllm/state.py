"""The model state: told of every request by vLLM's model runner, it prepares every step of the model."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch
from torch import Tensor, nn
from vllm.config.compilation import CUDAGraphMode
from vllm.v1.core.sched.output import NewRequestData
from vllm.v1.kv_cache_interface import AttentionSpec, FullAttentionSpec, KVCacheConfig, SlidingWindowSpec
from vllm.v1.worker.gpu.input_batch import InputBatch
from vllm.v1.worker.gpu.model_states.default import DefaultModelState

from gearshift.errors import GearshiftError
from gearshift.serve.vllm.attention import AttentionMixer
from gearshift.serve.vllm.guards import expect_signature
from gearshift.serve.vllm.layout import KINDS, Kind
from gearshift.serve.vllm.model import ServedSupernet, StepPlan
from gearshift.serve.vllm.placements import PlacedLayers, PlacementTable
from gearshift.serve.vllm.plugin import cache_types
from gearshift.serve.vllm.pool import attention_pages, page_count, state_pages
from gearshift.serve.vllm.step import PageTables, Rows

if TYPE_CHECKING:
    from vllm.config import VllmConfig

expect_signature(DefaultModelState.__init__, "self", "vllm_config", "model", "encoder_cache", "device")
expect_signature(DefaultModelState.add_request, "self", "req_index", "new_req_data")
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
        self._tables: PageTables | None = None
        self._builders: dict[str, Any] = {}

    def add_request(self, req_index: int, new_req_data: NewRequestData) -> None:
        """A request starts, or comes back after it was preempted."""
        super().add_request(req_index, new_req_data)
        params = new_req_data.sampling_params
        try:
            placed = self._placements.of_extra_args(None if params is None else params.extra_args)
        except GearshiftError:
            # The scheduler has refused it already; what its one step computes is not looked at.
            placed = self._placements.default
        self._placed[req_index] = placed

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
        assert cudagraph_mode == CUDAGraphMode.NONE, "this version of the plugin runs without CUDA graphs"
        if self._tables is None:
            self._tables = self._open_pool(kv_cache_config)
        step = _Step(self._served, self._tables, self._builders, input_batch, self._placed)
        self._served.plan = step.plan(block_tables)
        return step.metadata

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


class _Step:
    """The preparation of one step. Layers whose rows are the same share all but pages and slots."""

    def __init__(
        self,
        served: ServedSupernet,
        tables: PageTables,
        builders: dict[str, Any],
        batch: InputBatch,
        placed: list[PlacedLayers],
    ) -> None:
        self._served, self._tables, self._builders, self._batch = served, tables, builders, batch
        self._placed = [placed[index] for index in batch.idx_mapping_np[: batch.num_reqs]]
        self._rows: dict[bytes, Rows] = {}
        self._built: dict[tuple[int, bytes], Any] = {}
        self.metadata: dict[str, Any] = {}
        self._slot_mapping: dict[str, Tensor] = {}

    def plan(self, block_tables: tuple[Tensor, ...]) -> StepPlan:
        """Build the metadata of all layers; returns what the model wants to know beside it."""
        batch, layout = self._batch, self._served.layout
        longest = int(batch.seq_lens_cpu_upper_bound[: batch.num_reqs].max())
        kinds = np.unique(np.concatenate([placed.kind for placed in self._placed]))
        pages: dict[Kind, Tensor] = {}
        slots: dict[Kind, Tensor] = {}
        for kind in (KINDS[index] for index in kinds):
            blocks = 1 if kind == "state" else -(-longest // layout.block_tokens)
            pages[kind] = self._tables.pages(kind, self._placed, block_tables, blocks)
            if kind != "state":
                slots[kind] = self._tables.slots(pages[kind], batch)
        rows = [self._layer(number, pages, slots) for number in range(len(self._served.plan.rows))]
        return StepPlan(rows, self._slot_mapping)

    def _layer(
        self, number: int, pages: dict[Kind, Tensor], slots: dict[Kind, Tensor]
    ) -> dict[str, Tensor | None]:
        """One layer's metadata; returns the tokens of each of its mixers."""
        mixers = np.array([placed.placement[number] for placed in self._placed])
        found: dict[str, Tensor | None] = {}
        for name in dict.fromkeys(mixers.tolist()):
            requests = np.nonzero(mixers == name)[0]
            key = requests.tobytes()
            if key not in self._rows:
                self._rows[key] = Rows.select(self._batch, requests)
            rows = self._rows[key]
            kind = KINDS[self._placed[requests[0]].kind[number]]
            mixer = cast(nn.ModuleDict, self._layer_module(number).mixers)[name]
            own_pages = rows.of_requests(pages[kind][number])
            if isinstance(mixer, AttentionMixer):
                own_slots = rows.of_tokens(slots[kind][number])
                self._attention(mixer.attn.layer_name, key, rows, own_pages, own_slots)
            else:
                self.metadata[cast(Any, mixer).prefix] = rows.recurrent(own_pages[:, 0].long())
            found[name] = rows.tokens
        return found

    def _layer_module(self, number: int) -> Any:  # noqa: ANN401 - a ServedLayer
        return self._served.model.layers[number]

    def _attention(self, name: str, key: bytes, rows: Rows, pages_RW: Tensor, slots_N: Tensor) -> None:
        builder = self._builders[name]
        pages_RW = pages_RW.contiguous()
        if (id(builder), key) not in self._built:
            self._built[id(builder), key] = builder.build(0, rows.attention(pages_RW, slots_N))
        # Nothing but these two depends on the layer.
        self.metadata[name] = replace(
            self._built[id(builder), key], block_table=pages_RW, slot_mapping=slots_N
        )
        self._slot_mapping[name] = slots_N

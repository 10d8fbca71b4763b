"""The metadata of all layers of one step, in the form that vLLM's attention backends and our mixers read."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, cast

import numpy as np
from torch import Tensor, nn
from vllm.v1.worker.gpu.input_batch import InputBatch

from gearshift.serve.vllm.attention import AttentionMixer
from gearshift.serve.vllm.graphs import GraphPages, page_filler
from gearshift.serve.vllm.model import ServedSupernet, StepPlan
from gearshift.serve.vllm.placements import PlacedLayers
from gearshift.serve.vllm.step import PageTables, Rows, Seats, request_of_tokens
from gearshift.slot_layout import KINDS, Kind


class StepMetadata:
    """Collects what the layers of a step need. Layers whose rows are the same share all but pages and slots.

    Args:
        served: the model.
        builders: of attention metadata, for each layer by its prefix.

    Attributes:
        by_layer: the metadata of each layer by its prefix.
        slot_mapping: for each attention by its prefix, where the new keys and values go.
    """

    def __init__(self, served: ServedSupernet, builders: dict[str, Any]) -> None:
        self._served, self._builders = served, builders
        self._built: dict[tuple[int, bytes], Any] = {}
        self.by_layer: dict[str, Any] = {}
        self.slot_mapping: dict[str, Tensor] = {}

    def add(
        self, layer: int, mixer_name: str, key: bytes, rows: Rows, pages_RW: Tensor, slots_N: Tensor | None
    ) -> None:
        """One mixer of a layer; rows with equal keys are the same."""
        mixers = cast(nn.ModuleDict, cast(Any, self._served.model.layers[layer]).mixers)
        mixer: Any = mixers[mixer_name]
        if isinstance(mixer, AttentionMixer):
            assert slots_N is not None
            self._add_attention(mixer.attn.layer_name, key, rows, pages_RW, slots_N)
        else:
            self.by_layer[mixer.prefix] = rows.recurrent(pages_RW[:, 0])

    def _add_attention(self, name: str, key: bytes, rows: Rows, pages_RW: Tensor, slots_N: Tensor) -> None:
        builder = self._builders[name]
        if (id(builder), key) not in self._built:
            self._built[id(builder), key] = builder.build(0, rows.attention(pages_RW, slots_N))
        # Nothing but these two depends on the layer.
        built = self._built[id(builder), key]
        self.by_layer[name] = replace(built, block_table=pages_RW, slot_mapping=slots_N)
        self.slot_mapping[name] = slots_N


class MixedStep:
    """The preparation of a step whose requests may have any placements, in any number of tokens.

    Args:
        served: the model.
        tables: where pages are.
        builders: see `StepMetadata`.
        batch: vLLM's.
        placed: the placement of each of its requests.
    """

    def __init__(
        self,
        served: ServedSupernet,
        tables: PageTables,
        builders: dict[str, Any],
        batch: InputBatch,
        placed: list[PlacedLayers],
    ) -> None:
        self._served, self._tables, self._batch, self._placed = served, tables, batch, placed
        self._rows: dict[bytes, Rows] = {}
        self.metadata = StepMetadata(served, builders)

    def plan(self, block_tables: tuple[Tensor, ...]) -> StepPlan:
        """Build the metadata of all layers; returns what the model wants to know beside it."""
        batch, layout = self._batch, self._served.layout
        longest = int(batch.seq_lens_cpu_upper_bound[: batch.num_reqs].max())
        kinds = np.unique(np.concatenate([placed.kind for placed in self._placed]))
        pages: dict[Kind, Tensor] = {}
        slots: dict[Kind, Tensor] = {}
        positions, request = batch.positions[: batch.num_tokens], request_of_tokens(batch)
        for kind in (KINDS[index] for index in kinds):
            blocks = 1 if kind == "state" else -(-longest // layout.block_tokens)
            seats = Seats.of_requests(kind, self._placed, batch.seq_lens.device)
            pages[kind] = self._tables.pages(kind, seats, block_tables, batch.num_reqs, blocks)
            if kind != "state":
                slots[kind] = self._tables.slots(pages[kind], request, positions)
        rows = [self._layer(number, pages, slots) for number in range(len(self._served.plan.rows))]
        return StepPlan(rows, self.metadata.slot_mapping)

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
            own_slots = rows.of_tokens(slots[kind][number]) if kind in slots else None
            own_pages = rows.of_requests(pages[kind][number]).contiguous()
            self.metadata.add(number, name, key, rows, own_pages, own_slots)
            found[name] = rows.tokens
        return found


def pure_step(
    served: ServedSupernet,
    tables: PageTables,
    graph_pages: GraphPages,
    builders: dict[str, Any],
    batch: InputBatch,
    placed: PlacedLayers,
    block_tables: tuple[Tensor, ...],
    longest: int,
) -> tuple[StepMetadata, StepPlan]:
    """A decode step of one placement as a graph holds it: right for whatever vLLM's buffers hold later.

    Args:
        served: the model.
        tables: where pages are.
        graph_pages: where the graph puts them.
        builders: see `StepMetadata`.
        batch: one token for each request, in vLLM's buffers.
        placed: the placement of all of them.
        block_tables: vLLM's, in its buffers.
        longest: tokens that a request may have.
    """
    parts = graph_pages.of(placed, batch.num_reqs)
    rows, metadata = Rows.of_decode(batch, longest), StepMetadata(served, builders)
    for number, mixer in enumerate(placed.placement):
        pages, slots = parts[KINDS[placed.kind[number]]].of_layer(number)
        metadata.add(number, mixer, b"", rows, pages, slots)
    everything: list[dict[str, Tensor | None]] = [{mixer: None} for mixer in placed.placement]
    fill = page_filler(tables, placed, parts, block_tables, batch)
    return metadata, StepPlan(everything, metadata.slot_mapping, fill)

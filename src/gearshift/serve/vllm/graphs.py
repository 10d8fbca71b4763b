"""CUDA graphs of decode steps whose requests all have one declared placement.

Such a *pure* graph holds only the mixers of its placement. What changes from step to step lies in buffers
that vLLM fills anyway (block tables, lengths, positions); the pages of every layer are worked out from them
inside the graph, so that replaying one costs the host nothing but the launch.

Letters: L layers of one kind of cache, R requests of the graph, W token blocks of the longest request.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from vllm.v1.worker.gpu.input_batch import InputBatch

from gearshift.serve.vllm.placements import PlacedLayers
from gearshift.serve.vllm.step import PageTables, Seats
from gearshift.slot_layout import KINDS, Kind, SlotLayout


@dataclass(frozen=True)
class LayerPages:
    """The layers of one placement that have the same kind of cache, and where a graph puts their pages.

    Attributes:
        layers: their numbers.
        pages: of each layer, (L, R, W), int32; (L, R, 1) for states.
        slots: where each layer puts the keys and values of each token, (L, R), int64; None for states.
    """

    layers: tuple[int, ...]
    pages: Tensor
    slots: Tensor | None

    def of_layer(self, number: int) -> tuple[Tensor, Tensor | None]:
        """The rows of one layer."""
        index = self.layers.index(number)
        return self.pages[index], None if self.slots is None else self.slots[index]


class GraphPages:
    """Buffers for the pages of all graphs, which run one at a time and so share them.

    Args:
        layout: the cut of the cache.
        layers: layers of the model.
        requests: the most that a graph has.
        tokens: the longest request there may be.
        device: where.
    """

    def __init__(
        self, layout: SlotLayout, layers: int, requests: int, tokens: int, device: torch.device
    ) -> None:
        self._blocks = -(-tokens // layout.block_tokens)
        self._pages = {
            kind: torch.zeros(
                (layers, requests, 1 if kind == "state" else self._blocks), dtype=torch.int32, device=device
            )
            for kind, _ in layout.kinds
        }
        self._slots = {
            kind: torch.zeros((layers, requests), dtype=torch.int64, device=device)
            for kind in self._pages
            if kind != "state"
        }

    def of(self, placed: PlacedLayers, requests: int) -> dict[Kind, LayerPages]:
        """The parts that a graph of this placement and so many requests fills."""
        found: dict[Kind, LayerPages] = {}
        for index, kind in enumerate(KINDS):
            layers = tuple(number for number, own in enumerate(placed.kind) if own == index)
            if layers:
                slots = self._slots.get(kind)
                found[kind] = LayerPages(
                    layers,
                    self._pages[kind][: len(layers), :requests],
                    None if slots is None else slots[: len(layers), :requests],
                )
        return found


def page_filler(
    tables: PageTables,
    placed: PlacedLayers,
    parts: Mapping[Kind, LayerPages],
    block_tables: tuple[Tensor, ...],
    batch: InputBatch,
) -> Callable[[], None]:
    """What a graph does first: work out pages and slots of all of its layers from vLLM's buffers.

    Rows that only fill the graph up get page 0, which the kernels of states leave alone, and slot -1, which
    is not written.
    """
    device = batch.seq_lens.device
    seats = {kind: Seats.of_one(placed, part.layers, device) for kind, part in parts.items()}
    requests = torch.arange(batch.num_reqs, device=device)

    def fill() -> None:
        nobody = batch.seq_lens == 0
        for kind, part in parts.items():
            pages = tables.pages(kind, seats[kind], block_tables, batch.num_reqs, part.pages.shape[2])
            if part.slots is None:
                pages = pages.masked_fill(nobody[:, None], 0)
            else:
                slots = tables.slots(pages, requests, batch.positions)
                part.slots.copy_(slots.masked_fill(nobody, -1))
            part.pages.copy_(pages)

    return fill

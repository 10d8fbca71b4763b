"""One step's arithmetic: which rows of the batch a layer's mixer works on, and on which pages.

Letters: L layers, R requests of the batch, N its tokens, W token blocks of the longest request.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor
from vllm.v1.attention.backend import CommonAttentionMetadata
from vllm.v1.worker.gpu.input_batch import InputBatch

from gearshift.serve.vllm.guards import expect_fields
from gearshift.serve.vllm.placements import PlacedLayers
from gearshift.serve.vllm.recurrent_ops import RecurrentMetadata
from gearshift.slot_layout import KINDS, Kind, SlotLayout

expect_fields(
    InputBatch,
    "num_reqs",
    "num_tokens",
    "num_tokens_after_padding",
    "idx_mapping_np",
    "query_start_loc",
    "query_start_loc_np",
    "seq_lens",
    "seq_lens_cpu_upper_bound",
    "num_computed_tokens_np",
    "positions",
)
expect_fields(
    CommonAttentionMetadata, "query_start_loc", "seq_lens", "block_table_tensor", "slot_mapping", "positions"
)


@dataclass(frozen=True)
class Rows:
    """Some requests of a batch, and their tokens, as the metadata of kernels wants them.

    Attributes:
        requests: their numbers in the batch; None if they are all of it.
        tokens: the numbers of their tokens; None likewise.
        lengths: tokens of each.
        starts: borders between them, on the device and on the CPU.
        seq_lens: tokens of each with what is cached, on the device, and the longest.
        continued: whether a request has tokens in the cache already.
        all_decode: whether all of them have, and one new token.
        positions: of the tokens.
        made: what backends made of the rows, for all layers that have them.
    """

    requests: Tensor | None
    tokens: Tensor | None
    lengths: tuple[int, ...]
    starts: Tensor
    starts_cpu: Tensor
    seq_lens: Tensor
    seq_lens_cpu: Tensor
    continued: Tensor
    all_decode: bool
    positions: Tensor
    made: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def select(cls, batch: InputBatch, requests: np.ndarray) -> Rows:
        """The rows of these requests, given by their numbers in rising order."""
        device = batch.seq_lens.device
        borders = batch.query_start_loc_np[: batch.num_reqs + 1].astype(np.int64)
        lengths = np.diff(borders)[requests]
        everything = len(requests) == batch.num_reqs
        tokens = None if everything else _ranges(borders[requests], lengths)
        rows = torch.from_numpy(requests)
        starts = torch.from_numpy(np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32))
        continued = batch.num_computed_tokens_np[requests] > 0
        tokens = None if tokens is None else tokens.to(device)
        rows_there = rows.to(device)
        return cls(
            None if everything else rows_there,
            tokens,
            tuple(lengths.tolist()),
            starts.to(device),
            starts,
            batch.seq_lens[: batch.num_reqs] if everything else batch.seq_lens[rows_there],
            batch.seq_lens_cpu_upper_bound[rows],
            torch.from_numpy(continued).to(device),
            bool(continued.all() and lengths.max() == 1),
            batch.positions[: batch.num_tokens] if tokens is None else batch.positions[tokens],
        )

    @classmethod
    def of_decode(cls, batch: InputBatch, longest: int) -> Rows:
        """One more token for every request, in vLLM's buffers, which may hold other ones later.

        Args:
            batch: it.
            longest: tokens that a request may have.
        """
        count = batch.num_reqs
        return cls(
            None,
            None,
            (1,) * count,
            batch.query_start_loc,
            torch.arange(count + 1, dtype=torch.int32),
            batch.seq_lens,
            torch.full((count,), longest, dtype=torch.int32),
            torch.ones(count, dtype=torch.bool, device=batch.seq_lens.device),
            True,
            batch.positions,
        )

    def of_requests(self, table: Tensor) -> Tensor:
        """These requests' rows of a table with one for each request."""
        return table if self.requests is None else table[self.requests]

    def of_tokens(self, table: Tensor) -> Tensor:
        """These tokens' entries of a table with one for each token."""
        return table if self.tokens is None else table[self.tokens]

    def attention(self, pages_RW: Tensor, slots_N: Tensor) -> CommonAttentionMetadata:
        """What vLLM's builders of attention metadata read."""
        return CommonAttentionMetadata(
            query_start_loc=self.starts,
            query_start_loc_cpu=self.starts_cpu,
            seq_lens=self.seq_lens,
            num_reqs=len(self.lengths),
            num_actual_tokens=len(self.positions),
            max_query_len=max(self.lengths),
            max_seq_len=int(self.seq_lens_cpu.max()),
            block_table_tensor=pages_RW,
            slot_mapping=slots_N,
            seq_lens_cpu_upper_bound=self.seq_lens_cpu,
            positions=self.positions,
        )

    def recurrent(self, pages_R: Tensor) -> RecurrentMetadata:
        """What the recurrent mixers read."""
        return RecurrentMetadata(
            self.starts, self.lengths, pages_R, self.continued, self.all_decode, self.made
        )


def request_of_tokens(batch: InputBatch) -> Tensor:
    """The number of the request that each token belongs to, (N)."""
    lengths = np.diff(batch.query_start_loc_np[: batch.num_reqs + 1])
    return torch.from_numpy(np.repeat(np.arange(batch.num_reqs), lengths)).to(batch.seq_lens.device)


def _ranges(begins: np.ndarray, lengths: np.ndarray) -> Tensor:
    """begins[0], begins[0] + 1, ... for lengths[0] numbers, then the same for the next."""
    ends = np.cumsum(lengths)
    return torch.from_numpy(np.repeat(begins - (ends - lengths), lengths) + np.arange(ends[-1]))


@dataclass(frozen=True)
class Seats:
    """Where in their groups the pages of layers are, each (L, R); (L, 1) where all requests are alike.

    Attributes:
        group: index among the groups of the kind.
        offset, stride, fold: see `gearshift.slot_layout.Seat`.
    """

    group: Tensor
    offset: Tensor
    stride: Tensor
    fold: Tensor

    @classmethod
    def of_requests(cls, kind: Kind, placed: list[PlacedLayers], device: torch.device) -> Seats:
        """All layers of each request's placement; rubbish where a layer has another kind."""
        own = np.stack([p.kind == KINDS.index(kind) for p in placed], axis=1)
        seats_4LR = np.where(own, np.stack([p.seat for p in placed], axis=2), 1) * own
        seats_4LR[3] = np.maximum(seats_4LR[3], 1)
        return cls(*torch.from_numpy(seats_4LR).to(device))

    @classmethod
    def of_one(cls, placed: PlacedLayers, layers: Sequence[int], device: torch.device) -> Seats:
        """Some layers of one placement."""
        return cls(*torch.from_numpy(placed.seat[:, list(layers), None].copy()).to(device))


class PageTables:
    """The pages of layers for a batch's requests, one kind of cache at a time.

    Args:
        layout: the cut of the cache.
        group_numbers: vLLM's number of each group.
    """

    def __init__(self, layout: SlotLayout, group_numbers: dict[tuple[Kind, int], int]) -> None:
        self._layout, self._numbers = layout, group_numbers

    def pages(
        self, kind: Kind, seats: Seats, tables: tuple[Tensor, ...], requests: int, token_blocks: int
    ) -> Tensor:
        """Page of every layer, request and token block, (L, R, W).

        Args:
            kind: of cache.
            seats: of the layers.
            tables: vLLM's block table of each group, (R or more, blocks).
            requests: R.
            token_blocks: W.
        """
        cut, device = self._layout[kind], tables[0].device
        group, offset, stride, fold = (
            x[..., None] for x in (seats.group, seats.offset, seats.stride, seats.fold)
        )
        blocks = torch.arange(token_blocks, device=device)
        stacked = torch.stack([tables[self._numbers[kind, index]][:requests] for index in range(cut.groups)])
        request = torch.arange(requests, device=device)[None, :, None]
        entry = (blocks // fold).clamp(max=stacked.shape[-1] - 1)
        block = stacked[group, request, entry]
        return (block * cut.slots + blocks % fold * stride + offset).int()

    def slots(self, pages_LRW: Tensor, request_N: Tensor, positions_N: Tensor) -> Tensor:
        """Where each layer puts the keys and values of each token, (L, N)."""
        tokens = self._layout.block_tokens
        return pages_LRW[:, request_N, positions_N // tokens].long() * tokens + positions_N % tokens

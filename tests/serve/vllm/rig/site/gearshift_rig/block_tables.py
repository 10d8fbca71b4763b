"""Two of vLLM's Triton kernels as plain torch: interpreted, they take half of a step's time on this rig.

`install` puts them in the place of the kernels; a test compares the two.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

PADDING = -1
# vLLM's own, for the test.
replaced: dict[str, Any] = {}


def install() -> None:
    """Replace the kernels' callers; after vllm is imported, before an engine is made."""
    from vllm.v1.worker.gpu.block_table import BlockTables

    owner: Any = BlockTables
    replaced.update(gather=owner.gather_block_tables, slots=owner.compute_slot_mappings)
    owner.gather_block_tables = gather_block_tables
    owner.compute_slot_mappings = compute_slot_mappings


def gather_block_tables(
    self: Any,
    idx_mapping: Tensor,
    num_reqs_padded: int,
    out: tuple[Tensor, ...] | None = None,
    out_ptrs: Tensor | None = None,
) -> tuple[Tensor, ...]:
    """Each request's blocks in the order of the batch; what lies behind them in a row stays as it was."""
    targets = self.input_block_tables if out is None else out
    for group, (source, target) in enumerate(zip(self.block_tables, targets, strict=True)):
        for row, request in enumerate(idx_mapping.tolist()):
            count = int(self.num_blocks.np[group, request])
            target[row, :count] = source.gpu[request, :count]
        target[len(idx_mapping) : num_reqs_padded] = 0
    return tuple(target[:num_reqs_padded] for target in targets)


def compute_slot_mappings(
    self: Any,
    idx_mapping: Tensor,
    query_start_loc: Tensor,
    positions: Tensor,
    num_tokens_padded: int,
    out: Tensor | None = None,
) -> Tensor:
    """Each token's slot in each group, as if every group held every token."""
    mappings = self.slot_mappings if out is None else out
    mappings.fill_(PADDING)
    tokens = int(query_start_loc[len(idx_mapping)])
    lengths = query_start_loc[: len(idx_mapping) + 1].diff()
    requests = torch.repeat_interleave(idx_mapping, lengths).long()
    where = positions[:tokens]
    for group, (table, size) in enumerate(zip(self.block_tables, self.kernel_block_sizes, strict=True)):
        mappings[group, :tokens] = table.gpu[requests, where // size].long() * size + where % size
    return mappings[:, :num_tokens_padded]

"""Loaders that give each tensor-parallel rank its part of a weight; vLLM's linear layers bring their own."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from vllm.distributed import get_tensor_model_parallel_rank, get_tensor_model_parallel_world_size
from vllm.model_executor.utils import set_weight_attrs

from gearshift.errors import CheckpointError

ShardLoader = Callable[..., None]


def sharded_parameter(sections: Sequence[int], *inner: int, dtype: torch.dtype | None = None) -> nn.Parameter:
    """An empty parameter whose first dimension joins sections, each shared out among the ranks on its own.

    A rank has its part of the first section, then its part of the second, and so on: cutting the joined
    weight as one would give it heads of queries where it expects keys.

    Args:
        sections: sizes of the sections before they are shared out.
        inner: further dimensions, the same on every rank.
        dtype: by default the model's.
    """
    ranks = get_tensor_model_parallel_world_size()
    assert all(size % ranks == 0 for size in sections)
    parameter = nn.Parameter(torch.empty(sum(sections) // ranks, *inner, dtype=dtype), requires_grad=False)
    set_weight_attrs(parameter, {"weight_loader": _section_loader(tuple(sections))})
    return parameter


def _section_loader(sections: tuple[int, ...]) -> ShardLoader:
    def load(parameter: nn.Parameter, weight: Tensor, section: int | None = None) -> None:
        """Take one section's weight, or with None that of all sections joined."""
        wanted = range(len(sections)) if section is None else [section]
        expected = sum(sections[index] for index in wanted)
        if weight.shape[0] != expected:
            raise CheckpointError(f"a weight of {weight.shape[0]} rows; expected {expected}")
        parts = weight.split([sections[index] for index in wanted])
        for index, part in zip(wanted, parts, strict=True):
            _place(parameter, part, index, sections)

    return load


def _place(parameter: nn.Parameter, part: Tensor, index: int, sections: tuple[int, ...]) -> None:
    ranks, rank = get_tensor_model_parallel_world_size(), get_tensor_model_parallel_rank()
    size = sections[index] // ranks
    begin = sum(sections[:index]) // ranks
    own = part[rank * size : (rank + 1) * size].reshape(size, *parameter.shape[1:])
    parameter.data[begin : begin + size].copy_(own)

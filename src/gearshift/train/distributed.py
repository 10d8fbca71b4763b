"""Several processes that train one model: who they are, what they add up, and how they share its memory.

Started by ``torchrun``, which sets the environment that is read here. Alone, nothing of this does anything.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

from gearshift.supernet import SupernetForCausalLM


def speaks() -> bool:
    """Whether this process is the one of a run that tells people things."""
    return os.environ.get("RANK", "0") == "0"


@dataclass(frozen=True)
class Group:
    """The processes of a run.

    Attributes:
        rank: this one, from 0.
        ranks: how many.
        device: where this one computes.
    """

    rank: int
    ranks: int
    device: torch.device

    @property
    def first(self) -> bool:
        """Whether this is the process that writes what is written once."""
        return self.rank == 0

    def add_up(self, values: Tensor) -> Tensor:
        """The sum over processes."""
        if self.ranks > 1:
            dist.all_reduce(values)
        return values

    def wait(self) -> None:
        """Until every process is here."""
        if self.ranks > 1:
            dist.barrier()


@contextmanager
def joined_group(device: torch.device) -> Iterator[Group]:
    """Join the processes that torchrun started; this process alone where it did not start any."""
    ranks = int(os.environ.get("WORLD_SIZE", "1"))
    if ranks == 1:
        yield Group(0, 1, device)
        return
    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    try:
        yield Group(dist.get_rank(), ranks, device)
    finally:
        dist.destroy_process_group()


def share_weights(model: SupernetForCausalLM, group: Group, half: bool) -> None:
    """Split every layer's weights over the processes (FSDP2); a layer is gathered whole when it is needed.

    All mixers of a layer are gathered together, since each process draws its own placement. Embedding, head
    and final norm stay whole in every process: they are frozen, and losses read the head chunk by chunk.

    Args:
        model: whole, in main memory.
        group: the processes; alone, nothing is split.
        half: gather and compute in bfloat16; gradients are added up in float32.
    """
    if group.ranks == 1:
        return
    mesh = init_device_mesh(group.device.type, (group.ranks,))
    policy = MixedPrecisionPolicy(
        param_dtype=torch.bfloat16 if half else None, reduce_dtype=torch.float32, cast_forward_inputs=False
    )
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh, mp_policy=policy)
    kept = (model.model.embed_tokens, model.model.norm, model.model.rotary_emb, model.lm_head)
    for part in kept:
        part.to(group.device)
    whole = {p for part in kept[:2] for p in part.parameters()}
    fully_shard(model.model, mesh=mesh, mp_policy=policy, ignored_params=whole)


def local(tensor: Tensor) -> Tensor:
    """This process's part of a tensor that is split, or the tensor."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def whole(tensor: Tensor) -> Tensor:
    """A tensor put together again, in main memory; every process has to take part."""
    data = tensor.detach()
    return (data.full_tensor() if isinstance(data, DTensor) else data).cpu()

"""A supernet's tensors into the modules of `gearshift.serve.vllm`: where each goes, and that all came."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor, nn
from vllm.model_executor.model_loader.weight_utils import default_weight_loader

from gearshift.errors import CheckpointError
from gearshift.placement import (
    FULL_ATTENTION,
    GATED_DELTA_NET,
    KIMI_DELTA_ATTENTION,
    SLIDING_ATTENTION,
)
from gearshift.serve.vllm import attention, delta_mixers, feed_forward

# For each kind of module: a checkpoint's name, the module here, and the part of it.
Destinations = Mapping[str, tuple[str, str | int | None]]
_DESTINATIONS: dict[str, Destinations] = {
    f"mixers.{FULL_ATTENTION}": attention.MERGED,
    f"mixers.{SLIDING_ATTENTION}": attention.MERGED,
    f"mixers.{GATED_DELTA_NET}": delta_mixers.GDN_MERGED,
    f"mixers.{KIMI_DELTA_ATTENTION}": delta_mixers.KDA_MERGED,
    "mlp": feed_forward.MERGED,
}
TIED = "lm_head.weight"


def load_weights(model: nn.Module, weights: Iterable[tuple[str, Tensor]], tied: bool) -> set[str]:
    """Load every tensor; returns the names of the parameters that were filled.

    Raises:
        CheckpointError: a tensor is unknown, or none came for a part of a parameter.
    """
    parameters = dict(model.named_parameters())
    filled: dict[str, set[str | int | None]] = {}
    for name, weight in weights:
        if name == TIED and tied:
            continue
        target, part = destination(name, parameters)
        parameter = parameters[target]
        loader: Any = getattr(parameter, "weight_loader", default_weight_loader)
        loader(parameter, weight) if part is None else loader(parameter, weight, part)
        filled.setdefault(target, set()).add(part)
    _check_complete(parameters, filled, tied)
    return set(filled)


def destination(name: str, parameters: dict[str, nn.Parameter]) -> tuple[str, str | int | None]:
    """The parameter, and the part of it, for a checkpoint's tensor.

    Raises:
        CheckpointError: there is none.
    """
    target, part = name, None
    for owner, merged in _DESTINATIONS.items():
        before, found, rest = name.partition(f".{owner}.")
        module, _, attribute = rest.rpartition(".")
        if not found or module not in merged:
            continue
        new, index = merged[module]
        joined = f"{before}.{owner}.{new}.{attribute}"
        if joined in parameters:  # an FFN without a gate joins nothing
            target, part = joined, index
    if target not in parameters:
        raise CheckpointError(
            f"the checkpoint has {name}, but nothing of this supernet's config.json takes it; restore it"
        )
    return target, part


def _check_complete(
    parameters: dict[str, nn.Parameter], filled: dict[str, set[str | int | None]], tied: bool
) -> None:
    """Every parameter must have come, and of joined weights every part; biases may lack parts."""
    needed = set(parameters) - ({TIED} if tied else set())
    missing = sorted(needed - set(filled))
    for name, parts in filled.items():
        expected = _parts_of(name)
        if expected and parts != expected and not name.endswith(".bias"):
            missing.append(f"{name} ({', '.join(str(part) for part in expected - parts)})")
    if missing:
        raise CheckpointError(
            f"the checkpoint lacks {len(missing)} tensors that its config.json promises, such as "
            f"{missing[0]}; restore it"
        )


def _parts_of(target: str) -> set[str | int | None]:
    """The parts that a joined parameter is filled from; empty for the others."""
    for owner, merged in _DESTINATIONS.items():
        _, found, rest = target.partition(f".{owner}.")
        if found:
            return {part for module, part in merged.values() if module == rest.rpartition(".")[0]}
    return set()

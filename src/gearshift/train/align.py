"""The align stage: every mixer of every layer learns from one teacher pass, each on its own.

A mixer gets the teacher's hidden states as its input and the teacher's mixer output as its target. No
gradient goes through depth, and no student drifts away from what the teacher sees, so a step costs little and
its gradient is clean; what it cannot teach is how mixers make up for each other's errors. That is left to the
distillation of placements that follows.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from gearshift.placement import FULL_ATTENTION, short_name
from gearshift.supernet import SequenceContext, SupernetForCausalLM
from gearshift.train.losses import activation_matching


@dataclass(frozen=True)
class Observed:
    """What the full attention of one layer was given, and what it made of it.

    Attributes:
        input_BTD: the layer's normed input.
        context: positions and padding.
        output_BTD: the mixer's output.
    """

    input_BTD: Tensor
    context: SequenceContext
    output_BTD: Tensor


@torch.no_grad()
def observe_teacher(model: SupernetForCausalLM, input_ids_BT: Tensor) -> list[Observed]:
    """Run the teacher and keep what passes through the full attention of every layer, in layer order.

    Raises:
        PlacementError: a layer holds no full attention.
    """
    seen: list[Observed] = []

    def keep(mixer: nn.Module, given: tuple[Tensor, SequenceContext, None], output: Tensor) -> None:
        seen.append(Observed(given[0], given[1], output))

    placement = model.placement_space.teacher()
    hooks = [_mixers(layer)[FULL_ATTENTION].register_forward_hook(keep) for layer in model.model.layers]
    try:
        model(input_ids_BT, placement=placement, use_cache=False, logits_to_keep=1)
    finally:
        for hook in hooks:
            hook.remove()
    return seen


def mixer_losses(model: SupernetForCausalLM, observed: list[Observed]) -> Iterator[tuple[str, Tensor]]:
    """The relative distance of every trained mixer from the teacher's, named as in ``kda in layer 3``.

    One at a time, so that a caller who runs the backward pass at once holds one mixer's graph in memory.
    """
    for layer, (module, seen) in enumerate(zip(model.model.layers, observed, strict=True)):
        for name, mixer in _mixers(module).items():
            if name != FULL_ATTENTION:
                output = mixer(seen.input_BTD, seen.context, None)
                yield f"{short_name(name)} in layer {layer}", activation_matching([output], [seen.output_BTD])


def _mixers(layer: nn.Module) -> nn.ModuleDict:
    assert isinstance(layer.mixers, nn.ModuleDict)
    return layer.mixers

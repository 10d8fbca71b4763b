"""What training adds to a supernet's layers: alignment, recomputation, and gradients for idle mixers.

Everything happens inside the layer's own forward pass, where its weights are whole even when they are split
over GPUs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from gearshift.placement import FULL_ATTENTION
from gearshift.supernet import SequenceContext, SupernetForCausalLM
from gearshift.train.losses import Form, distance

# In the place of a mixer's name: the teacher's attention goes on, and every other mixer is compared with it.
ALIGN = "align"
# The teacher's attention where full attention is trained: a frozen copy of it as it was.
TEACHER_ATTENTION = "teacher_attention"


@dataclass
class LayerSettings:
    """What all layers of a training share.

    Attributes:
        teacher: the name of the teacher's attention among a layer's mixers.
        recompute: keep a layer's input and output alone, and compute it again in the backward pass.
        touch: give every trained mixer a gradient, of zeros where it was not used, because processes that
            split the weights have to add up the same tensors.
        weight_N: what each token counts, for alignment.
        form: of the distance, for alignment.
    """

    teacher: str = FULL_ATTENTION
    recompute: bool = False
    touch: bool = False
    weight_N: Tensor | None = None
    form: Form = "relative"


def prepare_layers(model: SupernetForCausalLM, settings: LayerSettings, compile_ffn: bool = False) -> None:
    """Let every layer do what training needs, under the settings, which may change between passes."""
    for layer in model.model.layers:
        if compile_ffn:
            assert isinstance(layer.mlp, nn.Module)
            layer.mlp.compile()
        layer.forward = _TrainingForward(layer, settings)


def keep_teacher(model: SupernetForCausalLM) -> None:
    """Keep a frozen copy of full attention in every layer, so that full attention can be trained."""
    from copy import deepcopy

    for layer in model.model.layers:
        mixers = mixers_of(layer)
        mixers[TEACHER_ATTENTION] = deepcopy(mixers[FULL_ATTENTION]).requires_grad_(False)


def release_layers(model: SupernetForCausalLM) -> None:
    """Make the layers a supernet's own again."""
    for layer in model.model.layers:
        layer.__dict__.pop("forward", None)
        if TEACHER_ATTENTION in (mixers := mixers_of(layer)):
            del mixers[TEACHER_ATTENTION]


def mixers_of(layer: nn.Module) -> nn.ModuleDict:
    """A layer's mixers by name."""
    assert isinstance(layer.mixers, nn.ModuleDict)
    return layer.mixers


def aligned_mixers(layer: nn.Module) -> list[str]:
    """The mixers of a layer that learn from full attention."""
    return [name for name in mixers_of(layer) if name not in (FULL_ATTENTION, TEACHER_ATTENTION)]


class _TrainingForward:
    """In the place of a layer's ``forward``; takes what that takes."""

    def __init__(self, layer: nn.Module, settings: LayerSettings) -> None:
        self.layer, self.settings = layer, settings
        self.plain: Callable[..., tuple[Tensor, Tensor]] = layer.forward

    def __call__(
        self, hidden_BTD: Tensor, mixer: str, context: SequenceContext, state: None
    ) -> tuple[Tensor, Tensor]:
        learning = torch.is_grad_enabled()
        if mixer == ALIGN:
            return self._align(hidden_BTD, context)
        run = self._again(self.plain) if learning and self.settings.recompute else self.plain
        hidden_BTD, mixed_BTD = run(hidden_BTD, mixer, context, state)
        if learning and self.settings.touch:
            hidden_BTD = _touch(hidden_BTD, self._idle([mixer]))
        return hidden_BTD, mixed_BTD

    def _align(self, hidden_BTD: Tensor, context: SequenceContext) -> tuple[Tensor, Tensor]:
        """The teacher's output, and in the place of a mixer's output the distance of every other mixer, (M).

        The output hangs on the input for the backward pass alone, in which nothing but zeros goes that way:
        so a process that splits the weights lets go of a layer as soon as it is done with it.
        """
        settings = self.settings
        with torch.no_grad():
            out_BTD, target_BTD = self.plain(hidden_BTD, settings.teacher, context, None)
            x_BTD = self.layer.input_layernorm(hidden_BTD)  # pyright: ignore[reportCallIssue] - a module
        names = aligned_mixers(self.layer)
        losses = []
        for name in names:
            run = partial_distance(mixers_of(self.layer)[name], context, settings)
            run = self._again(run) if settings.recompute else run
            losses.append(run(x_BTD, target_BTD))
        out_BTD = _follow(hidden_BTD, out_BTD)
        if settings.touch:
            out_BTD = _touch(out_BTD, self._idle(names))
        return out_BTD, torch.stack(losses) if losses else out_BTD.new_zeros(0)

    @staticmethod
    def _again(run: Callable[..., Any]) -> Callable[..., Any]:
        return lambda *inputs: checkpoint(run, *inputs, use_reentrant=False)

    def _idle(self, used: Sequence[str]) -> list[Tensor]:
        """Trained parameters of the mixers that were not used."""
        mixers = mixers_of(self.layer)
        return [
            p
            for name, mixer in mixers.items()
            if name not in used
            for p in mixer.parameters()
            if p.requires_grad
        ]


def partial_distance(
    mixer: nn.Module, context: SequenceContext, settings: LayerSettings
) -> Callable[[Tensor, Tensor], Tensor]:
    """A function from a mixer's input and the teacher's output to their distance."""
    weight_N, form = settings.weight_N, settings.form
    assert weight_N is not None
    return lambda x_BTD, target_BTD: distance(mixer(x_BTD, context, None), target_BTD, weight_N, form)


def _touch(hidden_BTD: Tensor, idle: Sequence[Tensor]) -> Tensor:
    return _Touch.apply(hidden_BTD, *idle) if idle else hidden_BTD


class _Touch(torch.autograd.Function):
    """Returns its first input; the others get a gradient of zeros."""

    @staticmethod
    def forward(ctx: Any, hidden_BTD: Tensor, *idle: Tensor) -> Tensor:  # noqa: ANN401 - autograd's own context
        ctx.idle = [(p.shape, p.dtype, p.device) for p in idle]
        return hidden_BTD.view_as(hidden_BTD)

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, ...]:  # noqa: ANN401 # pyright: ignore
        zeros = (torch.zeros(shape, dtype=dtype, device=device) for shape, dtype, device in ctx.idle)
        return upstream, *zeros


def _follow(hidden_BTD: Tensor, out_BTD: Tensor) -> Tensor:
    return _Follow.apply(hidden_BTD, out_BTD) if hidden_BTD.requires_grad else out_BTD


class _Follow(torch.autograd.Function):
    """Returns its second input; what comes back goes to the first one."""

    @staticmethod
    def forward(ctx: Any, hidden_BTD: Tensor, out_BTD: Tensor) -> Tensor:  # noqa: ANN401
        return out_BTD.view_as(out_BTD)

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, None]:  # noqa: ANN401 # pyright: ignore
        return upstream, None

"""One optimiser step: of the align stage, or of the stochastic distillation of placements.

Teacher and student are the same model: with full attention everywhere it is the teacher, whose weights stay
frozen, and with a sampled placement it is the student.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor, nn
from torch.optim import AdamW

from gearshift.errors import GearshiftError
from gearshift.placement import FULL_ATTENTION, Placement
from gearshift.supernet import SupernetForCausalLM
from gearshift.train.align import mixer_losses, observe_teacher
from gearshift.train.data import PackedTokens
from gearshift.train.device import precision
from gearshift.train.losses import TeacherDistribution, activation_matching, forward_kl
from gearshift.train.recipe import DistillRecipe
from gearshift.train.sampling import sample_placement
from gearshift.train.schedule import learning_rate

BETAS = (0.9, 0.95)
# Scales, rates and filters are not pulled to zero: at zero they would switch their mixer off.
NEVER_DECAYED = ("norm", "conv", "A_log", "dt_bias")


class DivergedError(GearshiftError):
    """The loss or its gradient is no longer a finite number."""


@dataclass(frozen=True)
class Pass:
    """The losses of one backward pass, detached.

    Attributes:
        what: the placement, or which mixer of which layer.
        forward_kl: nats a token; None in the align stage, which has no logits.
        activation: relative distance of mixer outputs.
    """

    what: str
    forward_kl: Tensor | None
    activation: Tensor


@dataclass(frozen=True)
class StepResult:
    """What one step did; the losses are means over its passes, taken before the weights moved.

    ``stage`` is ``align`` or ``distill``; ``forward_kl`` is None and ``placements`` empty in the align stage.
    """

    step: int
    stage: str
    loss: float
    forward_kl: float | None
    activation: float
    gradient_norm: float
    learning_rate: float
    tokens: int
    placements: tuple[str, ...]


@dataclass(frozen=True)
class TeacherPass:
    """What a teacher pass leaves for the students of its micro-batch."""

    distribution: TeacherDistribution
    mixer_outputs: Sequence[Tensor]


class Trainer:
    """The model, its optimiser, and the steps that a recipe asks for.

    Args:
        model: a supernet in float32, on the device to train on; everything but its trained mixers gets
            frozen.
        tokens: the training tokens.
        recipe: what to do.
    """

    def __init__(self, model: SupernetForCausalLM, tokens: PackedTokens, recipe: DistillRecipe) -> None:
        self.model = model.train()
        self.tokens = tokens
        self.recipe = recipe
        self.trained = freeze_all_but_mixers(model)
        self.optimizer = build_optimizer(self.trained, recipe)
        self.device = next(iter(self.trained.values())).device

    def train_step(self, step: int) -> StepResult:
        """Take optimiser step ``step`` (from 1): the same step on the same weights gives the same result.

        Raises:
            DivergedError: a loss or the gradient is not finite; the weights are as they were before the step.
        """
        recipe = self.recipe
        aligning = step <= recipe.align_steps
        run = self._align if aligning else self._distill
        self.optimizer.zero_grad(set_to_none=True)
        passes = [done for index in range(recipe.micro_batches) for done in run(step, index)]
        norm = nn.utils.clip_grad_norm_(self.trained.values(), recipe.gradient_clip)
        _refuse_divergence(step, passes, norm)
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(recipe, step)
        # A mixer that no placement of this step used has no gradient: AdamW neither moves nor decays it.
        self.optimizer.step()
        activation = torch.stack([done.activation for done in passes]).mean().item()
        kls = [done.forward_kl for done in passes if done.forward_kl is not None]
        kl = torch.stack(kls).mean().item() if kls else None
        return StepResult(
            step=step,
            stage="align" if aligning else "distill",
            loss=activation if kl is None else _total(recipe, kl, activation),
            forward_kl=kl,
            activation=activation,
            gradient_norm=norm.item(),
            learning_rate=learning_rate(recipe, step),
            tokens=recipe.micro_batches * recipe.batch_size * recipe.sequence_length,
            placements=() if aligning else tuple(done.what for done in passes),
        )

    def _batch(self, step: int, micro_batch: int) -> Tensor:
        recipe = self.recipe
        batch = self.tokens.batch(step, micro_batch, recipe.batch_size, recipe.sequence_length, recipe.seed)
        return torch.from_numpy(batch).to(self.device)

    def _align(self, step: int, micro_batch: int) -> Iterator[Pass]:
        """Add the gradients of one micro-batch of the align stage, mixer by mixer."""
        held = [mixer for mixers in self.model.placement_space.layers for mixer in mixers]
        count = self.recipe.micro_batches * (len(held) - held.count(FULL_ATTENTION))
        with precision(self.device):
            observed = observe_teacher(self.model, self._batch(step, micro_batch))
            for what, loss in mixer_losses(self.model, observed):
                (loss / count).backward()
                yield Pass(what, None, loss.detach())

    def _distill(self, step: int, micro_batch: int) -> Iterator[Pass]:
        """Add the gradients of one micro-batch of distillation, placement by placement."""
        recipe = self.recipe
        input_ids = self._batch(step, micro_batch)
        teacher = self._run_teacher(input_ids)
        for draw in range(recipe.placements_per_batch):
            placement = sample_placement(
                self.model.placement_space, recipe.sampling, recipe.seed, step, micro_batch, draw
            )
            kl, activation = self._run_student(input_ids, placement, teacher)
            loss = _total(recipe, kl, activation)
            (loss / (recipe.micro_batches * recipe.placements_per_batch)).backward()
            yield Pass(str(placement), kl.detach(), activation.detach())

    @torch.no_grad()
    def _run_teacher(self, input_ids_BT: Tensor) -> TeacherPass:
        placement = self.model.placement_space.teacher()
        with precision(self.device):
            out = self.model(input_ids_BT, placement=placement, output_mixer_outputs=True, use_cache=False)
        return TeacherPass(TeacherDistribution.of(out.logits), out.mixer_outputs)

    def _run_student(
        self, input_ids_BT: Tensor, placement: Placement, teacher: TeacherPass
    ) -> tuple[Tensor, Tensor]:
        """The forward KL and the activation term of one placement.

        Activations are matched in the layers that do not use full attention. A full-attention layer has
        nothing to
        train: its output differs from the teacher's through its input alone, for which earlier layers already
            pay.
        """
        with precision(self.device):
            out = self.model(input_ids_BT, placement=placement, output_mixer_outputs=True, use_cache=False)
        replaced = [layer for layer, mixer in enumerate(placement) if mixer != FULL_ATTENTION]
        matched = activation_matching(
            [out.mixer_outputs[layer] for layer in replaced],
            [teacher.mixer_outputs[layer] for layer in replaced],
        )
        return forward_kl(out.logits, teacher.distribution), matched


def freeze_all_but_mixers(model: nn.Module) -> dict[str, nn.Parameter]:
    """Let only mixers other than full attention be trained; return their parameters by name."""
    model.requires_grad_(False)
    trained = {name: p for name, p in model.named_parameters() if _is_trained(name)}
    assert trained, "the model holds no mixer to train"
    for parameter in trained.values():
        parameter.requires_grad_(True)
    return trained


def _is_trained(name: str) -> bool:
    """``model.layers.3.mixers.gated_delta_net.A_log`` is; full attention and shared weights are not."""
    _, is_mixer, rest = name.partition(".mixers.")
    return bool(is_mixer) and not rest.startswith(f"{FULL_ATTENTION}.")


def build_optimizer(trained: dict[str, nn.Parameter], recipe: DistillRecipe) -> AdamW:
    """AdamW that decays matrices only."""
    decayed = [p for name, p in trained.items() if takes_weight_decay(name, p)]
    others = [p for name, p in trained.items() if not takes_weight_decay(name, p)]
    groups = [
        {"params": decayed, "weight_decay": recipe.weight_decay},
        {"params": others, "weight_decay": 0.0},
    ]
    return AdamW(groups, lr=recipe.learning_rate, betas=BETAS, fused=True)


def takes_weight_decay(name: str, parameter: Tensor) -> bool:
    """Whether a trained parameter is a projection, as opposed to a bias, a norm, a rate or a convolution."""
    return parameter.dim() >= 2 and not any(part in name for part in NEVER_DECAYED)


Loss = TypeVar("Loss", float, Tensor)


def _total(recipe: DistillRecipe, kl: Loss, activation: Loss) -> Loss:
    """The loss that distillation minimises."""
    return recipe.weights.forward_kl * kl + recipe.weights.activation * activation


def _refuse_divergence(step: int, passes: Sequence[Pass], norm: Tensor) -> None:
    terms = torch.stack(
        [p.activation if p.forward_kl is None else p.activation + p.forward_kl for p in passes]
    )
    broken = [p.what for p, finite in zip(passes, terms.isfinite().tolist(), strict=True) if not finite]
    if not broken and norm.isfinite():
        return
    what, where = ("the loss", broken) if broken else ("the gradient", [p.what for p in passes])
    raise DivergedError(
        f"{what} of step {step} is not a finite number ({'; '.join(where)}); the last checkpoint is intact: "
        "give a smaller learning_rate or gradient_clip, or more warmup_steps"
    )

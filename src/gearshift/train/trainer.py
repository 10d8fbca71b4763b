"""One optimiser step: of alignment, of the stochastic distillation of placements, or of fine-tuning."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import AdamW

from gearshift.errors import GearshiftError
from gearshift.placement import FULL_ATTENTION, Placement, short_name
from gearshift.train.distributed import Group, local
from gearshift.train.layers import TEACHER_ATTENTION, aligned_mixers
from gearshift.train.packing import Batch
from gearshift.train.passes import TERMS, Passes, Sums
from gearshift.train.recipe import AlignStage, DistillStage, PlacedStage, Recipe, TrainingStage
from gearshift.train.sampling import Sampler
from gearshift.train.schedule import learning_rate
from gearshift.train.top_k import TopKReader

BETAS = (0.9, 0.95)
# Scales, rates and filters are not pulled to zero: at zero they would switch their mixer off.
NEVER_DECAYED = ("norm", "conv", "A_log", "dt_bias")
DECAYED, OTHERS = 0, 1


class DivergedError(GearshiftError):
    """The loss or its gradient is no longer a finite number."""


@dataclass(frozen=True)
class StepResult:
    """What one step did; losses are means over its tokens, taken before the weights moved.

    Attributes:
        step: of the run, from 1.
        stage: its kind.
        loss: what was minimised.
        terms: the parts of it that were computed, by name.
        mixers: for each mixer its mean distance to the teacher and the norm of its gradient.
        layers: the mean distance to the teacher of each layer's mixers; None where none was compared.
        gradient_norm: of all trained weights, before it was clipped.
        learning_rate: of this step.
        tokens: read in this step, over all processes.
        counted: of these, the ones that were learned from.
        placements: how often each was drawn.
    """

    step: int
    stage: str
    loss: float
    terms: dict[str, float]
    mixers: dict[str, dict[str, float | None]]
    layers: list[float | None]
    gradient_norm: float
    learning_rate: float
    tokens: int
    counted: int
    placements: dict[str, int]


class Trainer:
    """The model, its optimiser, and the steps that a recipe asks for.

    Args:
        passes: the model's forward and backward passes.
        trained: the trained parameters by name.
        recipe: what to do.
        group: the processes that do it.
    """

    def __init__(
        self, passes: Passes, trained: dict[str, nn.Parameter], recipe: Recipe, group: Group
    ) -> None:
        self.passes, self.trained, self.recipe, self.group = passes, trained, recipe, group
        self.model = passes.model
        self.optimizer = build_optimizer(trained)
        self.samplers = {
            index: Sampler.of(
                self.model.placement_space,
                stage.sampling,
                recipe.placements,
                recipe.seed,
                recipe.trained != "mixers",
            )
            for index, stage in enumerate(recipe.stages)
            if isinstance(stage, PlacedStage)
        }
        self._recorded: dict[int, TopKReader] = {}
        self._by_mixer: dict[str, list[nn.Parameter]] = {}
        for name, parameter in trained.items():
            self._by_mixer.setdefault(mixer_of(name), []).append(parameter)

    def train_step(self, step: int, batches: Sequence[Batch]) -> StepResult:
        """Take step ``step`` of the run, from 1: the same step on the same weights gives the same result.

        Args:
            step: which.
            batches: the micro-batches of this process.

        Raises:
            DivergedError: a loss or the gradient is not finite; the weights are as they were before the step.
        """
        index, number = self.recipe.stage_of(step)
        stage = self.recipe.stages[index]
        assert isinstance(stage, TrainingStage)
        self.optimizer.zero_grad(set_to_none=True)
        batches = [batch.to(self.group.device) for batch in batches]
        counted = self._count(batches)
        sums = self.passes.zero()
        if isinstance(stage, AlignStage):
            drawn = []
            for batch in batches:
                self.passes.align(batch, counted, stage, sums)
        else:
            drawn = self._draw(stage, index, step, number)
            self._distill(stage, index, number, batches, counted, drawn, sums)
        self._forget_idle([placement for micro_batch in drawn for placement in micro_batch])
        squares = self._square_gradients()
        flat = self.group.add_up(torch.cat([sums.flat(), squares]))
        sums.fill(flat[: -len(squares)])
        norms = flat[-len(squares) :].sqrt()
        norm = norms.square().sum().sqrt()
        _refuse_divergence(step, sums, float(norm))
        rate = learning_rate(stage, number)
        self._update(stage, rate, norm)
        return self._result(step, stage, sums, norms, rate, counted, drawn)

    def _count(self, batches: Sequence[Batch]) -> int:
        """Counted tokens of the step, over all processes."""
        own = torch.stack([batch.counted.sum() for batch in batches]).sum()
        return int(self.group.add_up(own))

    def _draw(self, stage: PlacedStage, index: int, step: int, number: int) -> list[list[Placement]]:
        """The placements of every micro-batch of every process."""
        sampler, draws = self.samplers[index], range(stage.placements_per_batch)
        return [
            [sampler.draw(number, micro_batch, draw, run_step=step) for draw in draws]
            for micro_batch in range(stage.micro_batches)
        ]

    def _distill(
        self,
        stage: PlacedStage,
        index: int,
        number: int,
        batches: Sequence[Batch],
        counted: int,
        drawn: Sequence[Sequence[Placement]],
        sums: Sums,
    ) -> None:
        """Add the gradients of this process's micro-batches, placement by placement."""
        own = range(self.group.rank, stage.micro_batches, self.group.ranks)
        for micro_batch, batch in zip(own, batches, strict=True):
            placements = drawn[micro_batch]
            recorded = self._recorder(stage, index)
            if recorded is not None:
                teacher = recorded.read(number, micro_batch, batch)
            else:
                layers = {layer for p in placements for layer in self.passes.trained_layers(p)}
                teacher = self.passes.run_teacher(batch, stage.losses, layers)
            for placement in placements:
                total = counted * stage.placements_per_batch
                self.passes.learn(batch, total, placement, teacher, stage.losses, sums)

    def _recorder(self, stage: PlacedStage, index: int) -> TopKReader | None:
        """What stands in for a running teacher, if anything does."""
        if not isinstance(stage, DistillStage) or stage.teacher_logits is None:
            return None
        if index not in self._recorded:
            self._recorded[index] = TopKReader(stage.teacher_logits)
        return self._recorded[index]

    def _forget_idle(self, placements: Sequence[Placement]) -> None:
        """A mixer that this step did not use has no gradient: AdamW neither moves nor decays it.

        Without placements the step aligned, and used every mixer but full attention.
        """
        used = {(layer, name) for placement in placements for layer, name in enumerate(placement)}
        if not placements:
            layers = enumerate(self.model.model.layers)
            used = {(layer, name) for layer, module in layers for name in aligned_mixers(module)}
        for name, parameter in self.trained.items():
            if (layer_of(name), mixer_of(name)) not in used:
                parameter.grad = None

    def _square_gradients(self) -> Tensor:
        """The squared norm of the gradient of each kind of mixer, of this process's part of the weights."""
        squares = []
        for parameters in self._by_mixer.values():
            gradients = [local(p.grad) for p in parameters if p.grad is not None]
            norm = nn.utils.get_total_norm(gradients) if gradients else torch.zeros(())
            squares.append(norm.to(self.group.device).square())
        return torch.stack(squares)

    def _update(self, stage: TrainingStage, rate: float, norm: Tensor) -> None:
        nn.utils.clip_grads_with_norm_(self.trained.values(), stage.gradient_clip, norm)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.param_groups[DECAYED]["weight_decay"] = stage.weight_decay
        self.optimizer.step()

    def _result(
        self,
        step: int,
        stage: TrainingStage,
        sums: Sums,
        norms: Tensor,
        rate: float,
        counted: int,
        drawn: Sequence[Sequence[Placement]],
    ) -> StepResult:
        texts = [str(placement) for micro_batch in drawn for placement in micro_batch]
        return StepResult(
            step=step,
            stage=stage.stage,
            loss=float(sums.loss),
            terms=dict(_terms(stage, sums)),
            mixers=self._by_mixer_report(sums, dict(zip(self._by_mixer, norms.tolist(), strict=True))),
            layers=_means(sums.distance_LM.sum(1), sums.share_LM.sum(1)),
            gradient_norm=float(norms.square().sum().sqrt()),
            learning_rate=rate,
            tokens=stage.tokens_per_step,
            counted=counted,
            placements={text: texts.count(text) for text in dict.fromkeys(texts)},
        )

    def _by_mixer_report(self, sums: Sums, norms: Mapping[str, float]) -> dict[str, dict[str, float | None]]:
        means = _means(sums.distance_LM.sum(0), sums.share_LM.sum(0))
        return {
            short_name(name): {"activation": mean, "gradient_norm": norms[name]}
            for name, mean in zip(self.passes.mixers, means, strict=True)
            if name in norms
        }


def _terms(stage: TrainingStage, sums: Sums) -> Iterator[tuple[str, float]]:
    """The parts of the loss that this stage computes."""
    if isinstance(stage, AlignStage):
        yield "activation", float(sums.activation)
        return
    for name, value in zip(TERMS, sums.terms.tolist(), strict=True):
        if getattr(stage.losses, name):
            yield name, value
    if stage.losses.activation:
        yield "activation", float(sums.activation)


def _means(sums: Tensor, shares: Tensor) -> list[float | None]:
    pairs = zip(sums.tolist(), shares.tolist(), strict=True)
    return [value / share if share else None for value, share in pairs]


def freeze_all_but_mixers(model: nn.Module, attention: bool = False) -> dict[str, nn.Parameter]:
    """Let only mixers be trained, full attention only if asked for; return their parameters by name."""
    model.requires_grad_(False)
    frozen = {TEACHER_ATTENTION} if attention else {TEACHER_ATTENTION, FULL_ATTENTION}
    trained = {
        name: p for name, p in model.named_parameters() if ".mixers." in name and mixer_of(name) not in frozen
    }
    assert trained, "the model holds no mixer to train"
    for parameter in trained.values():
        parameter.requires_grad_(True)
    return trained


def mixer_of(name: str) -> str:
    """``gated_delta_net`` of ``model.layers.3.mixers.gated_delta_net.A_log``."""
    return name.partition(".mixers.")[2].partition(".")[0]


def layer_of(name: str) -> int:
    """``3`` of ``model.layers.3.mixers.gated_delta_net.A_log``."""
    return int(name.partition(".layers.")[2].partition(".")[0])


def build_optimizer(trained: Mapping[str, nn.Parameter]) -> AdamW:
    """AdamW that can decay matrices only; stages set the learning rate and the decay."""
    decayed = [p for name, p in trained.items() if takes_weight_decay(name, p)]
    others = [p for name, p in trained.items() if not takes_weight_decay(name, p)]
    groups: list[dict[str, Any]] = [{"params": decayed}, {"params": others}]
    return AdamW(groups, lr=0.0, betas=BETAS, weight_decay=0.0, fused=True)


def takes_weight_decay(name: str, parameter: Tensor) -> bool:
    """Whether a trained parameter is a projection, as opposed to a bias, a norm, a rate or a convolution."""
    return parameter.dim() >= 2 and not any(part in name for part in NEVER_DECAYED)


def _refuse_divergence(step: int, sums: Sums, norm: float) -> None:
    finite = math.isfinite(float(sums.loss))
    if finite and math.isfinite(norm):
        return
    what = "the gradient" if finite else "the loss"
    passes = [name for name, value in sums.broken if finite or not math.isfinite(float(value))]
    where = "; ".join(passes) or "in another process"
    raise DivergedError(
        f"{what} of step {step} is not a finite number ({where}); the last checkpoint is intact: "
        "give a smaller learning_rate or gradient_clip, or more warmup_steps"
    )

"""Forward and backward passes of one micro-batch: the teacher's, those of its students, and alignment.

Teacher and student are the same model: with the frozen full attention everywhere it is the teacher, and with
a drawn placement it is the student. Another model can be the teacher, too.

Shape letters: B batch, T tokens, D hidden size, N tokens of all sequences together, L layers, M mixers.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from gearshift.placement import FULL_ATTENTION, Placement, short_name
from gearshift.supernet import SupernetForCausalLM
from gearshift.train.device import Precision
from gearshift.train.head_losses import (
    FullTeacher,
    HeadWeights,
    TopKTeacher,
    head_losses,
    tokens_of_chunk,
)
from gearshift.train.layers import ALIGN, LayerSettings, aligned_mixers
from gearshift.train.losses import distance, token_weights
from gearshift.train.packing import Batch
from gearshift.train.recipe import AlignStage, LossWeights

TERMS = ("forward_kl", "reverse_kl", "cross_entropy")


@dataclass
class Sums:
    """What the passes of a step add up, on their device; of several processes it is added up once more.

    Attributes:
        loss: what is minimised.
        terms: of :func:`head_losses`, (3).
        activation: the mean distance of mixer outputs.
        distance_LM: sums of distances by layer and mixer.
        share_LM: how much of the step's tokens each of these sums is of.
        broken: passes of this process whose loss is not finite, by placement or mixer.
    """

    loss: Tensor
    terms: Tensor
    activation: Tensor
    distance_LM: Tensor
    share_LM: Tensor
    broken: list[tuple[str, Tensor]] = field(default_factory=list)

    @classmethod
    def zero(cls, layers: int, mixers: int, device: torch.device) -> Sums:
        """Nothing yet."""
        by_layer = (layers, mixers)
        loss, terms, activation, distance_LM, share_LM = (
            torch.zeros(size, device=device) for size in ((), (len(TERMS),), (), by_layer, by_layer)
        )
        return cls(loss, terms, activation, distance_LM, share_LM)

    def flat(self) -> Tensor:
        """All numbers in a row."""
        parts = (self.loss, self.terms, self.activation, self.distance_LM, self.share_LM)
        return torch.cat([part.flatten() for part in parts])

    def fill(self, flat: Tensor) -> None:
        """Take numbers back that `flat` gave."""
        parts = (self.loss, self.terms, self.activation, self.distance_LM, self.share_LM)
        for part, values in zip(parts, flat.split([part.numel() for part in parts]), strict=True):
            part.copy_(values.view_as(part))


@dataclass(frozen=True)
class TeacherPass:
    """What a teacher pass leaves for the students of its micro-batch.

    Attributes:
        head: what next-token distributions are made of; None where none is needed.
        mixer_outputs: of every layer; empty where none are needed.
    """

    head: FullTeacher | TopKTeacher | None
    mixer_outputs: Sequence[Tensor] = ()


class Passes:
    """Runs the passes of a step and adds their gradients to the model's.

    Args:
        model: the supernet, prepared by :func:`gearshift.train.layers.prepare_layers`.
        teacher: the model whose full attention teaches, often the same.
        settings: shared by the model's layers.
        precision: of products.
        ranks: how many processes there are; gradients of split weights are divided by it elsewhere.
        head_logits: logits that exist at a time.
    """

    def __init__(
        self,
        model: SupernetForCausalLM,
        teacher: SupernetForCausalLM,
        settings: LayerSettings,
        precision: Precision,
        ranks: int = 1,
        head_logits: int = 2**25,
    ) -> None:
        self.model, self.teacher, self.settings = model, teacher, settings
        self.precision, self.ranks = precision, ranks
        self.head_chunk = tokens_of_chunk(head_logits, model.lm_head.out_features)
        self.mixers = model.placement_space.mixers
        self.layers = model.placement_space.num_layers

    def zero(self) -> Sums:
        """Sums of no pass."""
        return Sums.zero(self.layers, len(self.mixers), self.model.lm_head.weight.device)

    def align(self, batch: Batch, total: int, stage: AlignStage, sums: Sums) -> None:
        """Every mixer of every layer learns from the teacher's hidden states, each on its own.

        A mixer gets the teacher's hidden states as its input and the teacher's mixer output as its target. No
        gradient goes through depth, and no student drifts away from what the teacher sees, so a step costs
        little and its gradient is clean; what it cannot teach is how mixers make up for each other's errors.
        That is left to the distillation of placements that follows.

        Args:
            batch: the micro-batch.
            total: counted tokens of the step, over all processes.
            stage: what to do.
            sums: where losses are added.
        """
        settings = self.settings
        settings.weight_N = token_weights(batch.counted, batch.counted.flatten(), total)
        settings.form = stage.activation_form
        with self.precision.autocast():
            hidden, losses = self.model.hidden_states(
                batch.input_ids, [ALIGN] * self.layers, batch.cu_seqlens
            )
        loss = torch.cat(list(losses)).mean()
        if hidden.requires_grad:
            torch.autograd.backward([loss * self.ranks, hidden], [None, torch.zeros_like(hidden)])
        else:
            (loss * self.ranks).backward()
        self._add_aligned(losses, settings.weight_N.sum(), loss.detach(), sums)

    def _add_aligned(self, losses: Sequence[Tensor], share: Tensor, loss: Tensor, sums: Sums) -> None:
        for layer, (module, values) in enumerate(zip(self.model.model.layers, losses, strict=True)):
            for name, value in zip(aligned_mixers(module), values.detach().unbind(), strict=True):
                sums.distance_LM[layer, self.mixers.index(name)] += value
                sums.share_LM[layer, self.mixers.index(name)] += share
                sums.broken.append((f"{short_name(name)} in layer {layer}", value))
        sums.loss += loss
        sums.activation += loss

    @torch.no_grad()
    def run_teacher(self, batch: Batch, losses: LossWeights, layers: Collection[int]) -> TeacherPass:
        """Run the teacher, if these losses need it, and keep the mixer outputs of these layers."""
        if not (losses.divergences or losses.activation):
            return TeacherPass(None)
        name = self.settings.teacher if self.teacher is self.model else FULL_ATTENTION
        with self.precision.autocast():
            hidden, outputs = self.teacher.hidden_states(
                batch.input_ids, [name] * self.layers, batch.cu_seqlens
            )
        head = FullTeacher(hidden.flatten(0, 1), self.teacher.lm_head.weight) if losses.divergences else None
        empty = hidden.new_zeros(0)
        return TeacherPass(head, [out if layer in layers else empty for layer, out in enumerate(outputs)])

    def learn(
        self,
        batch: Batch,
        total: float,
        placement: Placement,
        teacher: TeacherPass,
        losses: LossWeights,
        sums: Sums,
    ) -> None:
        """Add the gradient of one placement.

        Args:
            batch: the micro-batch.
            total: counted tokens of the step, over all processes and placements of a micro-batch.
            placement: the student.
            teacher: of the same micro-batch.
            losses: what to minimise.
            sums: where losses are added.
        """
        weight_N = token_weights(batch.counted, batch.counted.flatten(), total)
        with self.precision.autocast():
            hidden, outputs = self.model.hidden_states(batch.input_ids, list(placement), batch.cu_seqlens)
        weights = HeadWeights(losses.forward_kl, losses.reverse_kl, losses.cross_entropy, losses.temperature)
        loss, terms = head_losses(
            hidden.flatten(0, 1),
            self.model.lm_head.weight,
            weights,
            weight_N,
            teacher=teacher.head,
            targets_N=batch.targets.flatten(),
            chunk=self.head_chunk,
        )
        if losses.activation:
            matched = self._match(placement, outputs, teacher.mixer_outputs, weight_N, losses, sums)
            loss = loss + losses.activation * matched
        (loss * self.ranks).backward()
        sums.loss += loss.detach()
        sums.terms += terms
        sums.broken.append((str(placement), loss.detach()))

    def _match(
        self,
        placement: Placement,
        student: Sequence[Tensor],
        teacher: Sequence[Tensor],
        weight_N: Tensor,
        losses: LossWeights,
        sums: Sums,
    ) -> Tensor:
        """The mean distance of mixer outputs, in the layers whose mixer is trained.

        A frozen full-attention layer has nothing to train: its output differs from the teacher's through its
        input alone, for which earlier layers already pay.
        """
        matched, share = [], weight_N.sum()
        for layer in self.trained_layers(placement):
            name = placement[layer]
            value = distance(student[layer], teacher[layer], weight_N, losses.activation_form)
            sums.distance_LM[layer, self.mixers.index(name)] += value.detach()
            sums.share_LM[layer, self.mixers.index(name)] += share
            matched.append(losses.mixer_weight(name) * value)
        mean = torch.stack(matched).mean()
        sums.activation += mean.detach()
        return mean

    def trained_layers(self, placement: Placement) -> list[int]:
        """The layers of a placement in which something is trained."""
        attention = self.settings.teacher != FULL_ATTENTION or self.teacher is not self.model
        return [layer for layer, name in enumerate(placement) if attention or name != FULL_ATTENTION]

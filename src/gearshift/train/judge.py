"""Quality of named placements on held-out text while a run goes on."""

from __future__ import annotations

import math

import torch

from gearshift.placement import Placement
from gearshift.train.data import open_source
from gearshift.train.head_losses import HeadWeights, head_losses
from gearshift.train.losses import token_weights
from gearshift.train.packing import Batch, Layout, RowLane, make_batch
from gearshift.train.passes import Passes
from gearshift.train.recipe import HeldOutChecks, Recipe
from gearshift.train.sampling import named_placement
from gearshift.train.stage_data import StageData
from gearshift.train.tokens import text_encoder

CROSS_ENTROPY = HeadWeights(cross_entropy=1.0)


class Judge:
    """Measures held-out losses on the same text every time.

    Args:
        recipe: with what to judge by.
        checks: its part about that.
        data: gives the tokenizer.
        passes: the model.

    Raises:
        DataError: the text is missing.
        PlacementError: a placement does not fit.
    """

    def __init__(self, recipe: Recipe, checks: HeldOutChecks, data: StageData, passes: Passes) -> None:
        self.every, self.passes = checks.every, passes
        space = passes.model.placement_space
        self.placements: dict[str, Placement] = {
            text: named_placement(space, text, recipe.placements) for text in checks.placements
        }
        stage = recipe.stages[0]
        length = min(stage.sequence_length, checks.tokens)
        rows = min(stage.batch_size, max(1, checks.tokens // length))
        sources = [open_source(source) for source in checks.data]
        encoders = [text_encoder(data.tokenizer, source.column or "text") for source in checks.data]
        weights = [source.weight for source in checks.data]
        lane = RowLane(sources, weights, encoders, (0, 1), (0,), whole=False)
        layout = Layout(rows, 1, length, apart=False)
        count = max(1, checks.tokens // (layout.rows * length))
        self.batches = [make_batch([lane.next_row(length) for _ in range(rows)], False) for _ in range(count)]

    def __call__(self) -> dict[str, dict[str, float]]:
        """Loss in nats a token, quality and retention of every placement, and of the teacher."""
        teacher = self._loss([self.passes.settings.teacher] * self.passes.layers)
        losses = {name: self._loss(list(placement)) for name, placement in self.placements.items()}
        return {name: _row(loss, teacher) for name, loss in {"teacher": teacher, **losses}.items()}

    @torch.no_grad()
    def _loss(self, names: list[str]) -> float:
        model, losses = self.passes.model, []
        for batch in self.batches:
            moved: Batch = batch.to(model.lm_head.weight.device)
            with self.passes.precision.autocast():
                hidden, _ = model.hidden_states(moved.input_ids, names)
            weight_N = token_weights(moved.counted, moved.counted.flatten())
            loss, _ = head_losses(
                hidden.flatten(0, 1),
                model.lm_head.weight,
                CROSS_ENTROPY,
                weight_N,
                targets_N=moved.targets.flatten(),
                chunk=self.passes.head_chunk,
            )
            losses.append(loss)
        return float(torch.stack(losses).mean())


def _row(loss: float, teacher: float) -> dict[str, float]:
    return {"loss": loss, "quality": math.exp(-loss), "retention": math.exp(teacher - loss)}

"""What a run will take, from its recipe and the supernet's config alone: ``gearshift train --dry-run``."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from gearshift.convert.convert import supernet_config
from gearshift.convert.initialize import DEFAULT_INITIALIZER, INITIALIZERS
from gearshift.convert.teachers import read_teacher
from gearshift.errors import GearshiftError
from gearshift.placement import FULL_ATTENTION, MIXERS
from gearshift.supernet.checkpoint import read_config
from gearshift.supernet.config import SupernetConfig
from gearshift.tensor_headers import read_json_object
from gearshift.train.flops import FFN, NORMS, Flops, Sizes
from gearshift.train.head_losses import tokens_of_chunk
from gearshift.train.recipe import AlignStage, PlacedStage, Recipe, RecordStage, Stage
from gearshift.train.sampling import Sampler

FLOAT32, HALF, MOMENTS = 4, 2, 8
# Copies of a chunk's logits that exist at once: both log-probabilities, both probabilities, ratio, gradient.
LOGIT_COPIES = 6
# Tensors of hidden size that a layer keeps for its backward pass beside those of its FFN and its mixer.
KEPT_HIDDEN = 6
# Tensors of the mixer's width that it keeps: queries, keys, values, gates, outputs.
KEPT_MIXER = 6
SAMPLES = 64


class PlanError(GearshiftError):
    """There is nothing that a plan could be made from, or the run does not fit."""


@dataclass(frozen=True)
class StagePlan:
    """What one stage takes.

    Attributes:
        name: its number and kind.
        steps: how many.
        tokens: read in all.
        memory: bytes of one GPU, by part.
        seconds: expected time.
    """

    name: str
    steps: int
    tokens: int
    memory: dict[str, int]
    seconds: float

    @property
    def peak(self) -> int:
        """All parts together."""
        return sum(self.memory.values())


@dataclass(frozen=True)
class TrainingPlan:
    """What a run takes.

    Attributes:
        parameters: of the supernet.
        trained: of these, those that are trained.
        stages: one by one.
        gpus: GPUs it was made for.
        memory: bytes that each of them has.
    """

    parameters: int
    trained: int
    stages: tuple[StagePlan, ...]
    gpus: int
    memory: int

    @property
    def fits(self) -> bool:
        """Whether every stage goes into memory."""
        return all(stage.peak <= self.memory for stage in self.stages)


def plan_training(recipe: Recipe) -> TrainingPlan:
    """Make the plan of a run; no weight is read.

    Raises:
        PlanError: there is neither the supernet nor a ``shape`` in the recipe.
        PlacementError: a placement of the recipe does not fit.
    """
    sizes = Sizes.of(plan_config(recipe))
    stages = tuple(
        _plan_stage(f"{number} {stage.stage}", recipe, stage, sizes)
        for number, stage in enumerate(recipe.stages)
    )
    return TrainingPlan(
        sizes.total,
        sizes.trained(_attention(recipe)),
        stages,
        recipe.cluster.gpus,
        round(recipe.cluster.memory_gib * 2**30),
    )


def plan_config(recipe: Recipe) -> SupernetConfig:
    """The config of the supernet, or of the one that converting a teacher of the recipe's shape gives.

    Raises:
        PlanError: there is neither.
    """
    if (recipe.supernet / "config.json").exists():
        return read_config(recipe.supernet)
    if recipe.shape is None:
        raise PlanError(
            f"no supernet at {recipe.supernet} to plan with; convert a teacher first, or give its "
            "config.json as 'shape' in the recipe"
        )
    teacher = read_teacher(read_json_object(Path(recipe.shape)), str(recipe.shape))
    return supernet_config(teacher, MIXERS, None, INITIALIZERS[DEFAULT_INITIALIZER])


def _attention(recipe: Recipe) -> bool:
    return recipe.trained == "mixers_and_attention"


def _plan_stage(name: str, recipe: Recipe, stage: Stage, sizes: Sizes) -> StagePlan:
    cluster, flops = recipe.cluster, Flops(sizes, stage.sequence_length)
    each = flops.step(stage, _likely_placements(recipe, stage, sizes), _attention(recipe))
    speed = cluster.gpus * cluster.tflops * 1e12 * cluster.utilisation
    tokens = stage.steps * stage.tokens_per_step
    return StagePlan(name, stage.steps, tokens, dict(_memory(recipe, stage, sizes)), tokens * each / speed)


def _likely_placements(recipe: Recipe, stage: Stage, sizes: Sizes) -> list[list[str]]:
    """Placements as the stage draws them, for means over them."""
    if not isinstance(stage, PlacedStage):
        return []
    space, attention = sizes.config.placement_space, _attention(recipe)
    sampler = Sampler.of(space, stage.sampling, recipe.placements, recipe.seed, attention)
    steps = random.Random(0).choices(range(1, stage.steps + 1), k=SAMPLES)
    return [list(sampler.draw(step, micro_batch)) for micro_batch, step in enumerate(steps)]


def _memory(recipe: Recipe, stage: Stage, sizes: Sizes) -> Iterator[tuple[str, int]]:
    """Bytes of one GPU by part."""
    config, gpus = sizes.config, recipe.cluster.gpus
    assert config.hidden_size is not None and config.vocab_size is not None
    trained, layers = sizes.trained(_attention(recipe)), sum(layer.total() for layer in sizes.layers)
    whole = sizes.embedding + (0 if sizes.tied else sizes.head)
    yield "frozen weights", HALF * ((layers - trained) // gpus + whole)
    yield "trained weights", FLOAT32 * trained // gpus
    if not isinstance(stage, RecordStage):
        yield "gradients", FLOAT32 * trained // gpus
    yield "optimiser", MOMENTS * trained // gpus
    teacher = _second_teacher(recipe, sizes)
    if teacher:
        yield "teacher of its own", teacher
    if gpus > 1:
        # One layer computes while the next one is gathered; gradients of one are added up.
        largest = max(sizes.layers, key=lambda layer: layer.total())
        yield "gathered layers", 2 * HALF * largest.total() + FLOAT32 * largest.total()
    tokens = stage.batch_size * stage.sequence_length
    yield "activations", _activations(recipe, stage, sizes, tokens)
    if not isinstance(stage, AlignStage):
        chunk = min(tokens_of_chunk(recipe.scale.head_logits, config.vocab_size), tokens)
        yield "logits of a chunk", LOGIT_COPIES * FLOAT32 * chunk * config.vocab_size
        yield "hidden states", 3 * HALF * tokens * config.hidden_size


def _second_teacher(recipe: Recipe, sizes: Sizes) -> int:
    """Bytes of weights that only the teacher uses."""
    attention = sum(layer[FULL_ATTENTION] for layer in sizes.layers)
    if recipe.teacher is not None:
        shared = sum(layer[FFN] + layer[NORMS] for layer in sizes.layers)
        return HALF * (attention + shared + sizes.embedding + sizes.head)
    return HALF * attention // recipe.cluster.gpus if _attention(recipe) else 0


def _activations(recipe: Recipe, stage: Stage, sizes: Sizes, tokens: int) -> int:
    """What is kept for the backward pass, and the teacher's mixer outputs."""
    config = sizes.config
    assert config.hidden_size is not None and config.intermediate_size is not None
    assert config.num_attention_heads is not None and config.head_dim is not None
    count = len(sizes.layers)
    hidden, width = config.hidden_size, config.num_attention_heads * config.head_dim
    layer = KEPT_HIDDEN * hidden + 3 * config.intermediate_size + KEPT_MIXER * width
    if isinstance(stage, RecordStage):
        return HALF * tokens * layer
    if isinstance(stage, AlignStage):
        mixers = max(len(sizes.mixer_names(number)) for number in range(count)) - 1
        kept = (
            2 * hidden if recipe.scale.activation_checkpointing else 2 * hidden + mixers * KEPT_MIXER * width
        )
        return HALF * tokens * (count * kept + layer)
    matched = 2 * hidden * count if stage.losses.activation else 0
    kept = count * hidden + layer if recipe.scale.activation_checkpointing else count * layer
    return HALF * tokens * (kept + matched)

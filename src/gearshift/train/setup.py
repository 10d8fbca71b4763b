"""From a recipe to a trainer: load, check, freeze, keep a teacher, split over processes."""

from __future__ import annotations

from pathlib import Path

import torch

from gearshift.errors import GearshiftError
from gearshift.placement import FULL_ATTENTION
from gearshift.supernet import SupernetForCausalLM, load_supernet
from gearshift.supernet.checkpoint import read_config
from gearshift.train.device import Precision
from gearshift.train.distributed import Group, share_weights
from gearshift.train.layers import TEACHER_ATTENTION, LayerSettings, keep_teacher, prepare_layers
from gearshift.train.passes import Passes
from gearshift.train.recipe import AlignStage, Recipe
from gearshift.train.tokens import load_tokenizer
from gearshift.train.trainer import Trainer, freeze_all_but_mixers


class RunError(GearshiftError):
    """A run cannot start, or cannot go on, with what was given."""


def check_model(recipe: Recipe) -> None:
    """Refuse a supernet that cannot be trained by this recipe; only configs are read.

    Raises:
        RunError: it holds nothing to train, or sequences are longer than its teacher was made for.
        PlacementError: a layer holds no full attention.
        CheckpointError: it is missing or damaged.
    """
    config = read_config(recipe.supernet)
    mixers = config.placement_space.mixers
    if FULL_ATTENTION not in mixers or len(mixers) == 1:
        raise RunError(
            f"{recipe.supernet} holds only {', '.join(mixers)}; "
            "expected full_attention, the teacher, and others to train"
        )
    config.placement_space.teacher()  # refuses a supernet in which it cannot be run
    for stage in recipe.stages:
        if stage.sequence_length > config.max_position_embeddings:
            raise RunError(
                f"sequence_length is {stage.sequence_length} in the stage {stage.stage}; the teacher was "
                f"made for {config.max_position_embeddings} tokens at most"
            )
    if recipe.teacher is not None:
        _check_teacher(recipe, recipe.teacher)


def _check_teacher(recipe: Recipe, teacher: Path) -> None:
    if any(isinstance(stage, AlignStage) for stage in recipe.stages):
        raise RunError(
            f"teacher is {teacher}, but the stage align learns from the supernet's own full attention; "
            "leave one of them out"
        )
    own, other = read_config(recipe.supernet), read_config(teacher)
    other.placement_space.teacher()
    for key in ("vocab_size", "num_hidden_layers", "hidden_size"):
        if getattr(own, key) != getattr(other, key):
            raise RunError(
                f"the teacher {teacher} has {key} {getattr(other, key)}, the supernet {recipe.supernet} has "
                f"{getattr(own, key)}; expected the same"
            )
    if load_tokenizer(teacher).get_vocab() != load_tokenizer(recipe.supernet).get_vocab():
        raise RunError(
            f"the tokenizers of the teacher {teacher} and the supernet {recipe.supernet} have different "
            "vocabularies; expected the same tokens with the same numbers"
        )


def make_trainer(recipe: Recipe, group: Group) -> Trainer:
    """Load what is trained and what teaches.

    Raises:
        GearshiftError: a directory is missing or damaged.
    """
    precision = Precision.of(group.device, recipe.precision)
    model = _load(recipe.supernet, group)
    attention = recipe.trained == "mixers_and_attention"
    teacher, settings = model, LayerSettings(recompute=recipe.scale.activation_checkpointing)
    if recipe.teacher is not None:
        teacher = _load(recipe.teacher, group).requires_grad_(False)
        place(teacher, LayerSettings(), precision, recipe, group)
    elif attention:
        keep_teacher(model)
        settings.teacher = TEACHER_ATTENTION
    freeze_all_but_mixers(model, attention)
    place(model, settings, precision, recipe, group)
    # Splitting puts other tensors in the place of the parameters, so they are collected after it.
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    passes = Passes(model, teacher, settings, precision, group.ranks, recipe.scale.head_logits)
    return Trainer(passes, trained, recipe, group)


def _load(directory: Path, group: Group) -> SupernetForCausalLM:
    """A whole supernet: in main memory, if it is split afterwards, since it may not go into one GPU's."""
    device = group.device if group.ranks == 1 else torch.device("cpu")
    return load_supernet(directory, device=device).train()


def place(
    model: SupernetForCausalLM, settings: LayerSettings, precision: Precision, recipe: Recipe, group: Group
) -> None:
    """Make a loaded model ready: frozen matrices in the precision of products, its layers, weights split.

    Args:
        model: with what is trained chosen already.
        settings: shared by its layers.
        precision: of products.
        recipe: says what is compiled.
        group: the processes.
    """
    if precision.half:
        for parameter in model.parameters():
            if not parameter.requires_grad and parameter.dim() >= 2:
                parameter.data = parameter.data.to(torch.bfloat16)
    settings.touch = group.ranks > 1
    if settings.touch:
        # So that a layer is let go of in the backward pass as soon as its input's gradient is there.
        model.enable_input_require_grads()
    prepare_layers(model, settings, recipe.scale.compile)
    share_weights(model, group, precision.half)

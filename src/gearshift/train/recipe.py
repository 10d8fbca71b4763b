"""Distillation recipes: YAML files checked by pydantic; errors name the key and its line. No torch."""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, Self

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from pydantic_core import ErrorDetails

from gearshift.errors import GearshiftError

Location = tuple[str | int, ...]

# What a resumed run may change without changing its result; everything else must stay as it was.
CHANGEABLE = ("out", "supernet", "data", "save_every", "device")


class RecipeError(GearshiftError, ValueError):
    """A recipe has a wrong key or value."""


class LossWeights(BaseModel):
    """What each term counts in the loss; a term of weight 0 is still computed and logged."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    forward_kl: float = Field(
        default=1.0, ge=0, description="weight of KL(teacher || student) of the next token, in nats"
    )
    activation: float = Field(
        default=1.0, ge=0, description="weight of the relative distance of mixer outputs"
    )

    @model_validator(mode="after")
    def _at_least_one(self) -> Self:
        if self.forward_kl == 0 and self.activation == 0:
            raise ValueError("forward_kl and activation are both 0; expected at least one greater than 0")
        return self


class DistillRecipe(BaseModel):
    """One distillation run. Relative paths start at the current directory."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    supernet: Path = Field(description="the supernet directory to start from")
    out: Path = Field(description="the run directory to write")
    data: list[Path] = Field(min_length=1, description="files or folders with training text")
    steps: int = Field(gt=0, description="number of optimiser steps")
    align_steps: int = Field(
        default=0, ge=0, description="how many of the steps, the first ones, align each mixer on its own"
    )
    batch_size: int = Field(default=8, gt=0, description="sequences in a micro-batch")
    sequence_length: int = Field(default=256, gt=1, description="tokens in a sequence")
    micro_batches: int = Field(
        default=1, gt=0, description="micro-batches in a step, each with placements of its own"
    )
    placements_per_batch: int = Field(
        default=1, gt=0, description="student placements that share one teacher pass"
    )
    sampling: Literal["uniform", "composition"] = Field(
        default="uniform", description="how placements are drawn"
    )
    weights: LossWeights = Field(default=LossWeights(), description="weights of the loss terms")
    learning_rate: float = Field(default=1e-3, gt=0, description="learning rate after the warm-up")
    warmup_steps: int = Field(default=0, ge=0, description="steps in which the learning rate rises linearly")
    decay: Literal["cosine", "linear"] = Field(
        default="cosine", description="how the learning rate falls to a tenth"
    )
    weight_decay: float = Field(default=0.0, ge=0, description="AdamW's decay of the trained matrices")
    gradient_clip: float = Field(default=1.0, gt=0, description="largest norm of the gradient")
    seed: int = Field(default=0, ge=0, description="seed of the batches and of the placements")
    save_every: int = Field(default=200, gt=0, description="steps between two checkpoints")
    device: Literal["auto", "cpu", "cuda"] = Field(
        default="auto", description="auto takes the GPU if there is one"
    )

    @model_validator(mode="after")
    def _parts_fit_into_steps(self) -> Self:
        if self.warmup_steps >= self.steps:
            raise ValueError(
                f"warmup_steps is {self.warmup_steps} of {self.steps} steps; expected fewer than steps"
            )
        if self.align_steps > self.steps:
            raise ValueError(f"align_steps is {self.align_steps} of {self.steps} steps; expected no more")
        return self


def load_recipe(path: Path, overrides: Sequence[str] = ()) -> DistillRecipe:
    """Read a recipe; nothing heavy is imported, and nothing is loaded, before it has been found good.

    Args:
        path: the YAML file.
        overrides: changes such as ``learning_rate=1e-3`` or ``weights.forward_kl=1``, the value in YAML.

    Raises:
        RecipeError: the file, a key or a value is wrong; every wrong key is named with its line.
    """
    values, places = _read_yaml(path)
    for override in overrides:
        _apply_override(values, places, override)
    try:
        return DistillRecipe.model_validate(values)
    except ValidationError as error:
        raise RecipeError("\n".join(_explain(details, places, path) for details in error.errors())) from None


def write_recipe(recipe: DistillRecipe, path: Path) -> None:
    """Write a recipe, every value spelled out, so that `load_recipe` reads the same one back."""
    path.write_text(yaml.safe_dump(recipe.model_dump(mode="json"), sort_keys=False), encoding="utf-8")


def describe_changes(old: DistillRecipe, new: DistillRecipe) -> list[str]:
    """What differs between two recipes and would change the result, one line each."""
    before, after = (recipe.model_dump(mode="json", exclude=set(CHANGEABLE)) for recipe in (old, new))
    return [f"{key}: was {before[key]}, now {after[key]}" for key in before if before[key] != after[key]]


def _read_yaml(path: Path) -> tuple[dict[str, Any], dict[Location, str]]:
    """The values of a YAML file, and where each key stands."""
    try:
        text = path.read_text(encoding="utf-8")
        root = yaml.compose(text, Loader=yaml.SafeLoader)
        values = yaml.safe_load(text)
    except FileNotFoundError:
        raise RecipeError(f"{path} is missing; expected a YAML recipe there") from None
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise RecipeError(f"{path} cannot be read as YAML: {error}") from None
    if not isinstance(values, dict) or root is None:
        raise RecipeError(
            f"{path} holds {type(values).__name__}; expected keys and values such as 'steps: 100'"
        )
    places: dict[Location, str] = {}
    for location, line in _locate(root):
        if location in places:
            raise RecipeError(
                f"{path}, line {line}: {_dotted(location)} was already given on {places[location]}"
            )
        places[location] = f"line {line}"
    return values, places


def _locate(node: yaml.Node, above: Location = ()) -> Iterator[tuple[Location, int]]:
    """Every key and list item below ``node`` with its line, counted from 1."""
    if isinstance(node, yaml.MappingNode):
        children = [(key.value, key, value) for key, value in node.value]
    elif isinstance(node, yaml.SequenceNode):
        children = [(index, item, item) for index, item in enumerate(node.value)]
    else:
        children = []
    for name, marked, value in children:
        yield (*above, name), marked.start_mark.line + 1
        yield from _locate(value, (*above, name))


def _apply_override(values: dict[str, Any], places: dict[Location, str], override: str) -> None:
    name, equals, text = override.partition("=")
    if not equals or not name.strip():
        raise RecipeError(f"the override {override!r}; expected key=value, such as learning_rate=1e-3")
    location = tuple(name.strip().split("."))
    section = values
    for key in location[:-1]:
        section = section.setdefault(key, {})
        if not isinstance(section, dict):
            raise RecipeError(f"the override {override!r}: {key!r} has no keys below it")
    try:
        section[location[-1]] = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise RecipeError(f"the override {override!r}: {text!r} is not a YAML value ({error})") from None
    places[location] = f"the override {override!r}"


def _explain(details: ErrorDetails, places: dict[Location, str], path: Path) -> str:
    """One line for a person: where, what was given, what is allowed."""
    location = details["loc"]
    place = _place(location, places)
    where = f"{path}, {place}" if place.startswith("line") else place or str(path)
    name = _dotted(location)
    if details["type"] == "missing":
        meaning = _model_at(location).model_fields[str(location[-1])].description
        return f"{where}: the key {name!r} is missing: {meaning}"
    if details["type"] == "extra_forbidden":
        return f"{where}: unknown key {name!r}; {_suggest(location)}"
    message = details["msg"].removeprefix("Value error, ")
    if details["type"] == "value_error":
        return f"{where}: {message}"
    return f"{where}: {name}: given {details['input']!r}; {message[:1].lower()}{message[1:]}"


def _place(location: Location, places: dict[Location, str]) -> str:
    """Where the key, or the nearest one above it, was given; empty if it was not."""
    return next(
        (places[location[:end]] for end in range(len(location), 0, -1) if location[:end] in places), ""
    )


def _dotted(location: Location) -> str:
    return ".".join(str(part) for part in location)


def _model_at(location: Location) -> type[BaseModel]:
    return LossWeights if location[0] == "weights" and len(location) > 1 else DistillRecipe


def _suggest(location: Location) -> str:
    known = list(_model_at(location).model_fields)
    close = difflib.get_close_matches(str(location[-1]), known, n=1)
    return f"did you mean {close[0]!r}?" if close else f"expected one of {', '.join(known)}"

"""Reading and writing recipes: every mistake is named with its line and with what is allowed. No torch."""

from __future__ import annotations

import difflib
import types
import typing
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from gearshift.errors import GearshiftError
from gearshift.train.recipe import CHANGEABLE, Recipe

Location = tuple[str | int, ...]


class RecipeError(GearshiftError, ValueError):
    """A recipe has a wrong key or value."""


def load_recipe(path: Path, overrides: Sequence[str] = ()) -> Recipe:
    """Read a recipe; nothing heavy is imported, and nothing is loaded, before it has been found good.

    Args:
        path: the YAML file.
        overrides: changes such as ``seed=3`` or ``stages.0.steps=10``, the value in YAML.

    Raises:
        RecipeError: the file, a key or a value is wrong; every wrong key is named with its line.
    """
    values, places = _read_yaml(path)
    for override in overrides:
        _apply_override(values, places, override)
    try:
        return Recipe.model_validate(values)
    except ValidationError as error:
        lines = [_explain(details, places, path) for details in error.errors()]
        raise RecipeError("\n".join(dict.fromkeys(lines))) from None


def write_recipe(recipe: Recipe, path: Path) -> None:
    """Write a recipe, every value spelled out, so that `load_recipe` reads the same one back."""
    path.write_text(yaml.safe_dump(recipe.model_dump(mode="json"), sort_keys=False), encoding="utf-8")


def describe_changes(old: Recipe, new: Recipe) -> list[str]:
    """What differs between two recipes and would change the result, one line each."""
    before, after = (
        _without_paths(recipe.model_dump(mode="json", exclude=set(CHANGEABLE))) for recipe in (old, new)
    )
    return list(_differences(before, after, ""))


def _without_paths(value: Any) -> Any:  # noqa: ANN401 - JSON values
    """Local documents may have moved; digests tell whether they are the same."""
    if isinstance(value, dict):
        return {key: _without_paths(item) for key, item in value.items() if key != "path"}
    return [_without_paths(item) for item in value] if isinstance(value, list) else value


def _differences(before: Any, after: Any, name: str) -> Iterator[str]:  # noqa: ANN401 - JSON values
    if isinstance(before, dict) and isinstance(after, dict) and before.keys() == after.keys():
        for key in before:
            yield from _differences(before[key], after[key], f"{name}.{key}" if name else key)
    elif isinstance(before, list) and isinstance(after, list) and len(before) == len(after):
        for index, (old, new) in enumerate(zip(before, after, strict=True)):
            yield from _differences(old, new, f"{name}.{index}")
    elif before != after:
        yield f"{name}: was {before}, now {after}"


def _read_yaml(path: Path) -> tuple[dict[str, Any], dict[Location, str]]:
    """The values of a YAML file, and where each key stands."""
    try:
        text = path.read_text(encoding="utf-8")
        root = yaml.compose(text, Loader=yaml.SafeLoader)
        values = yaml.safe_load(text)
    except FileNotFoundError:
        raise RecipeError(f"{path} is missing; expected a YAML recipe there") from None
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise RecipeError(f"{path} cannot be read as YAML: {error}") from None
    if not isinstance(values, dict) or root is None:
        raise RecipeError(
            f"{path} holds {type(values).__name__}; expected keys and values such as 'out: runs/mine'"
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
        raise RecipeError(f"the override {override!r}; expected key=value, such as seed=3")
    keys = name.strip().split(".")
    section, location = values, ()
    for key in keys[:-1]:
        found = _key_in(section, key, override)
        location = (*location, found)
        section = section.setdefault(found, {}) if isinstance(section, dict) else section[found]
        if not isinstance(section, dict | list):
            raise RecipeError(f"the override {override!r}: {key!r} has no keys below it")
    last = _key_in(section, keys[-1], override)
    try:
        section[last] = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise RecipeError(f"the override {override!r}: {text!r} is not a YAML value ({error})") from None
    places[(*location, last)] = f"the override {override!r}"


def _key_in(section: Any, key: str, override: str) -> Any:  # noqa: ANN401 - a key or an index
    if isinstance(section, dict):
        return key
    if key.isdecimal() and int(key) < len(section):
        return int(key)
    raise RecipeError(
        f"the override {override!r}: {key!r} is no item of a list of {len(section)}; "
        f"expected a number from 0 to {len(section) - 1}"
    )


def _explain(details: ErrorDetails, places: dict[Location, str], path: Path) -> str:
    """One line for a person: where, what was given, what is allowed."""
    model, location = _follow(details["loc"])
    place = _place(location, places)
    where = f"{path}, {place}" if place.startswith("line") else place or str(path)
    name = _dotted(location)
    if details["type"] == "missing":
        assert model is not None
        return f"{where}: the key {name!r} is missing: {model.model_fields[str(location[-1])].description}"
    if details["type"] == "extra_forbidden":
        assert model is not None
        return f"{where}: unknown key {name!r}; {_suggest(str(location[-1]), model)}"
    if details["type"].startswith("union_tag"):
        return f"{where}: {name}: {_wrong_stage(details)}"
    message = details["msg"].removeprefix("Value error, ")
    if details["type"] == "value_error":
        return f"{where}: {name}: {message}" if name else f"{where}: {message}"
    return f"{where}: {name}: given {details['input']!r:.80}; {message[:1].lower()}{message[1:]}"


def _wrong_stage(details: ErrorDetails) -> str:
    context = details.get("ctx", {})
    expected = context.get("expected_tags", "'align', 'distill', 'sft', 'record'")
    given = context.get("tag")
    return f"the stage is {given!r}; expected one of {expected}" if given else f"expected 'stage': {expected}"


def _place(location: Location, places: dict[Location, str]) -> str:
    """Where the key, or the nearest one above it, was given; empty if it was not."""
    return next(
        (places[location[:end]] for end in range(len(location), 0, -1) if location[:end] in places), ""
    )


def _dotted(location: Location) -> str:
    return ".".join(str(part) for part in location)


def _follow(location: Location) -> tuple[type[BaseModel] | None, Location]:
    """The model that the last key of a location belongs to, and the location as it stands in the YAML.

    Pydantic puts the stage's kind between a stage's number and its keys; no file has it there.
    """
    model: type[BaseModel] | None = Recipe
    kept: list[str | int] = []
    holder: Any = Recipe
    for part in location:
        stages = {m for m in _models(holder) if m.model_fields.get("stage")}
        tagged = {typing.get_args(m.model_fields["stage"].annotation)[0]: m for m in stages}
        if kept and isinstance(kept[-1], int) and part in tagged:
            holder = tagged[part]
            continue
        owner = next((m for m in _models(holder) if part in m.model_fields), None)
        model = next(iter(_models(holder)), None) if owner is None else owner
        kept.append(part)
        if owner is not None:
            holder = owner.model_fields[str(part)].annotation
    return model, tuple(kept)


def _models(annotation: Any) -> list[type[BaseModel]]:  # noqa: ANN401 - any type annotation
    """The models that a type annotation mentions."""
    if isinstance(annotation, type) and not isinstance(annotation, types.GenericAlias):
        return [annotation] if issubclass(annotation, BaseModel) else []
    return [model for argument in typing.get_args(annotation) for model in _models(argument)]


def _suggest(key: str, model: type[BaseModel]) -> str:
    known = list(model.model_fields)
    close = difflib.get_close_matches(key, known, n=1)
    return f"did you mean {close[0]!r}?" if close else f"expected one of {', '.join(known)}"

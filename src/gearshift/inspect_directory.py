"""What is in a directory: a teacher, a supernet or a training run.

Reads JSON and the headers of safetensors files, never weights.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from gearshift.errors import CheckpointError, FileFormatError, GearshiftError
from gearshift.files import read_json, read_json_lines
from gearshift.placement import PlacementError, PlacementSpace
from gearshift.presets import Preset, read_presets
from gearshift.tensor_headers import TensorInfo, read_directory

SUPERNET_MODEL_TYPE = "gearshift_supernet"
SHARED = "shared"
ATTENTION = "attention"

_MIXER_TENSOR = re.compile(r"model\.layers\.(?P<layer>\d+)\.mixers\.(?P<mixer>\w+)\.")


class DirectoryError(GearshiftError):
    """A directory is missing, incomplete, or none that Gearshift knows."""


@dataclass
class Report:
    """What a directory holds.

    Attributes:
        path: the directory.
        kind: "teacher", "supernet" or "run".
        facts: what its configuration says, by label.
        parameters: numbers per part: a mixer's long name, "attention" of a teacher, or "shared" for all else.
        bytes: file bytes per part.
        presets: the presets of a supernet, by name.
        missing: what should be there and is not, one line each.
    """

    path: Path
    kind: str
    facts: dict[str, str] = field(default_factory=dict)
    parameters: Counter[str] = field(default_factory=Counter)
    bytes: Counter[str] = field(default_factory=Counter)
    presets: dict[str, Preset] = field(default_factory=dict)
    missing: list[str] = field(default_factory=list)


def inspect_directory(path: Path) -> Report:
    """Describe a teacher, supernet or run directory.

    Raises:
        DirectoryError: there is no such directory, or it is none of the three.
        FileFormatError: its ``config.json`` is not JSON.
        PresetError: its ``presets.json`` is malformed.
    """
    if not path.is_dir():
        raise DirectoryError(f"{path} is not a directory; expected a teacher, supernet or run directory")
    if (path / "config.json").exists():
        return _inspect_model(path)
    if (path / "recipe.yaml").exists():
        return _inspect_run(path)
    raise DirectoryError(
        f"{path} holds neither config.json nor recipe.yaml; expected a teacher, supernet or run directory"
    )


def supernet_space(path: Path) -> PlacementSpace:
    """The placements that a supernet directory allows, read before anything heavy is loaded.

    Raises:
        DirectoryError: it is no supernet directory.
        FileFormatError: its ``config.json`` is not JSON, or lacks what a supernet needs.
    """
    if not (path / "config.json").exists():
        raise DirectoryError(
            f"{path} is no supernet directory: it has no config.json; make one with gearshift convert"
        )
    config = _read_config(path)
    if config.get("model_type") != SUPERNET_MODEL_TYPE:
        raise DirectoryError(
            f"{path} holds a model of type {config.get('model_type')!r}; expected {SUPERNET_MODEL_TYPE!r}: "
            f"make a supernet of it with gearshift convert {path} OUT"
        )
    return _placement_space(path, config)


def weight_bytes(path: Path) -> tuple[dict[tuple[int, str], int], int]:
    """Bytes of each layer's mixers by (layer, long name), and of all other weights, of a supernet directory.

    Raises:
        CheckpointError: the weight files are missing or damaged.
    """
    mixers: Counter[tuple[int, str]] = Counter()
    shared = 0
    for name, stored in read_directory(path).items():
        found = _MIXER_TENSOR.match(name)
        if found:
            mixers[int(found["layer"]), found["mixer"]] += stored.info.nbytes
        else:
            shared += stored.info.nbytes
    return dict(mixers), shared


def _inspect_model(path: Path) -> Report:
    config = _read_config(path)
    is_supernet = config.get("model_type") == SUPERNET_MODEL_TYPE
    report = Report(path, "supernet" if is_supernet else "teacher")
    report.facts = {label: str(config[key]) for key, label in _SHOWN.items() if key in config}
    tensors = _read_tensors(path, report.missing)
    for name, info in tensors.items():
        part = _part(name)
        report.parameters[part] += info.numel
        report.bytes[part] += info.nbytes
    if is_supernet:
        space = _placement_space(path, config)
        report.presets = read_presets(path, space)
        report.missing += _missing_mixers(tensors, space)
    if not (path / "tokenizer.json").exists():
        report.missing.append("tokenizer.json: prompts cannot be read; copy the teacher's")
    return report


_SHOWN = {
    "model_type": "model type",
    "num_hidden_layers": "layers",
    "hidden_size": "hidden size",
    "num_attention_heads": "query heads",
    "num_key_value_heads": "key/value heads",
    "vocab_size": "vocabulary",
    "max_position_embeddings": "longest context",
    "placement": "default placement",
}


def _read_config(path: Path) -> dict[str, Any]:
    config = read_json(path / "config.json")
    if not isinstance(config, dict):
        raise FileFormatError(f"{path / 'config.json'} holds {type(config).__name__}; expected a JSON object")
    return config


def _placement_space(path: Path, config: dict[str, Any]) -> PlacementSpace:
    layers, mixers = config.get("num_hidden_layers"), config.get("mixers")
    by_layer = config.get("layer_mixers")
    if not isinstance(layers, int) or isinstance(layers, bool) or not isinstance(mixers, dict):
        raise FileFormatError(
            f"{path / 'config.json'}: num_hidden_layers is {layers!r}, mixers is a {type(mixers).__name__}; "
            "expected a whole number and an object: restore the file or convert the teacher again"
        )
    if by_layer is not None and not _are_objects(by_layer):
        raise FileFormatError(
            f"{path / 'config.json'}: layer_mixers is no list of objects; expected one for each layer, or "
            "null: restore the file or convert the teacher again"
        )
    try:
        return PlacementSpace(
            layers, tuple(mixers), None if by_layer is None else tuple(map(tuple, by_layer))
        )
    except PlacementError as error:
        raise FileFormatError(f"{path / 'config.json'}: {error}") from None


def _are_objects(given: object) -> bool:
    return isinstance(given, list) and all(isinstance(entry, dict) for entry in given)


def _part(name: str) -> str:
    mixer = _MIXER_TENSOR.match(name)
    if mixer:
        return mixer["mixer"]
    return ATTENTION if ".self_attn." in name else SHARED


def _missing_mixers(names: Iterable[str], space: PlacementSpace) -> Iterator[str]:
    found = {(int(m["layer"]), m["mixer"]) for name in names if (m := _MIXER_TENSOR.match(name))}
    for mixer in space.mixers:
        holding = [layer for layer, mixers in enumerate(space.layers) if mixer in mixers]
        layers = [layer for layer in holding if (layer, mixer) not in found]
        if layers:
            yield f"weights of {mixer} in layers {', '.join(map(str, layers))}"


def _read_tensors(path: Path, missing: list[str]) -> dict[str, TensorInfo]:
    """What the weight files hold; if they are not whole, that goes to ``missing``."""
    try:
        return {name: stored.info for name, stored in read_directory(path).items()}
    except CheckpointError as error:
        missing.append(str(error))
        return {}


def _inspect_run(path: Path) -> Report:
    report = Report(path, "run")
    metrics = path / "metrics.jsonl"
    rows = read_json_lines(metrics) if metrics.exists() else []
    if rows:
        report.facts = {
            key: str(value) for key, value in rows[-1].items() if isinstance(value, int | float | str)
        }
    else:
        report.missing.append("metrics.jsonl: no step was logged yet")
    if not (path / "supernet" / "config.json").exists():
        resumable = (path / "checkpoint").is_dir()
        report.missing.append(
            "supernet/: the run has not ended; "
            + ("go on with --resume" if resumable else "it has no checkpoint either, so start it again")
        )
    return report

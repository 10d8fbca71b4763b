"""Tiny random teachers with weights that say something."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel

SIZES: dict[str, Any] = {
    "vocab_size": 61,
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
}
WEIGHTS = "model.safetensors"


@dataclass(frozen=True)
class Variant:
    """One way in which a teacher of a family may come.

    Attributes:
        fields: of the config that makes the model.
        config_json: laid over what Transformers writes into ``config.json``; None removes a key.
        dtype: of the tensors.
        max_shard_size: of the files.
        tensors: changes the tensors of the file before anything reads them.
    """

    fields: dict[str, Any] = field(default_factory=dict)
    config_json: dict[str, Any] = field(default_factory=dict)
    dtype: torch.dtype = torch.float32
    max_shard_size: str = "1GB"
    tensors: Callable[[dict[str, Tensor]], dict[str, Tensor]] | None = None


def save_teacher(
    model_class: type[PreTrainedModel], config: PreTrainedConfig, variant: Variant, directory: Path
) -> Path:
    """A random model of the class as Transformers saves it, but for what the variant changes."""
    torch.manual_seed(1)
    model = model_class(config)
    enliven(model)
    for parameter in model.parameters():
        parameter.data = parameter.data.to(variant.dtype)
    model.config.dtype = variant.dtype
    model.save_pretrained(directory, max_shard_size=variant.max_shard_size)
    edit_config(directory, variant.config_json)
    if variant.tensors is not None:
        tensors = variant.tensors(load_file(directory / WEIGHTS))
        save_file(tensors, directory / WEIGHTS, metadata={"format": "pt"})
    return directory


@torch.no_grad()
def enliven(model: torch.nn.Module) -> None:
    """Norms that are not all one, biases that are not zero, and attention that is not flat."""
    for name, parameter in model.named_parameters():
        if name.endswith("norm.weight"):
            parameter.uniform_(0.5, 1.5)
        elif name.endswith(".bias"):
            parameter.uniform_(-0.5, 0.5)
        elif "proj" in name:
            parameter.mul_(5)


def edit_config(directory: Path, changes: dict[str, Any]) -> None:
    path = directory / "config.json"
    path.write_text(json.dumps(laid_over(json.loads(path.read_text()), changes)))


def laid_over(config: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """The config with keys changed or, where the change is None, removed; objects are laid over objects."""
    changed = dict(config)
    for key, value in changes.items():
        old = changed.get(key)
        changed[key] = laid_over(old, value) if isinstance(value, dict) and isinstance(old, dict) else value
    return {key: value for key, value in changed.items() if key not in changes or changes[key] is not None}


def all_tensors(directory: Path) -> dict[str, Tensor]:
    return {k: v for path in sorted(directory.glob("model*.safetensors")) for k, v in load_file(path).items()}


def same_tensors(directory: Path, expected: Path) -> bool:
    """Whether both hold the same tensors, name for name and bit for bit."""
    given, wanted = all_tensors(directory), all_tensors(expected)
    assert given.keys() == wanted.keys()
    return all(
        given[name].dtype == tensor.dtype and torch.equal(given[name], tensor)
        for name, tensor in wanted.items()
    )


def random_tokens(length: int = 40) -> Tensor:
    generator = torch.Generator().manual_seed(3)
    return torch.randint(0, SIZES["vocab_size"], (2, length), generator=generator)

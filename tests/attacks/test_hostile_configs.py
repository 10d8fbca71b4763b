"""Configs, small files and values that would fill the memory, leak a file or spoil a model: all refused."""

from __future__ import annotations

import json
import math
import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from gearshift.cli.info import run as info
from gearshift.convert import convert_teacher
from gearshift.errors import GearshiftError
from gearshift.inspect_directory import supernet_space
from gearshift.supernet import load_supernet, save_supernet

WEIGHTS = "model.safetensors"
SECONDS = 2.0
NORM = "model.layers.1.input_layernorm.weight"


@pytest.fixture
def teacher(teacher_directory: Path, tmp_path: Path) -> Path:
    """A copy to spoil."""
    return shutil.copytree(teacher_directory, tmp_path / "teacher")


@pytest.fixture
def supernet(supernet_directory: Path, tmp_path: Path) -> Path:
    """A copy to spoil."""
    return shutil.copytree(supernet_directory, tmp_path / "supernet")


def refused(read: Callable[[], object]) -> str:
    """What a quick refusal says."""
    started = time.process_time()
    with pytest.raises(GearshiftError) as error:
        read()
    assert time.process_time() - started < SECONDS
    assert len(str(error.value)) < 2000
    return str(error.value)


CONFIGS = [
    b"[" * 1_000_000,
    b'{"model_type":' * 1_000_000,
    b'{"hidden_size": ' + b"9" * 1_000_000 + b"}",
    b'{"model_type": "\xff"}',
    b"\0" * 1000,
]


@pytest.mark.parametrize("content", CONFIGS)
def test_a_config_made_to_be_parsed_for_ever(content: bytes, teacher: Path, supernet: Path, tmp_path: Path):
    for directory in (teacher, supernet):
        (directory / "config.json").write_bytes(content)
    for read in (
        lambda: convert_teacher(teacher, tmp_path / "out"),
        lambda: load_supernet(supernet),
        lambda: info(teacher),
        lambda: supernet_space(supernet),
    ):
        assert "config.json is not valid JSON" in refused(read)


def test_a_config_of_a_terabyte(teacher: Path, supernet: Path, tmp_path: Path):
    for directory in (teacher, supernet):
        os.truncate(directory / "config.json", 1 << 40)
    for read in (
        lambda: convert_teacher(teacher, tmp_path / "out"),
        lambda: load_supernet(supernet),
        lambda: info(teacher),
    ):
        assert "config.json has 1099511627776 bytes" in refused(read)


ABSURD: list[dict[str, Any]] = [
    {"num_hidden_layers": 10**9},
    {"num_hidden_layers": 4000},
    {"num_hidden_layers": 10**30},
    {"hidden_size": 2**40},
    {"hidden_size": 2**62},
    {"hidden_size": 10**30},
    {"vocab_size": 2**62},
    {"intermediate_size": 2**62},
    {"num_attention_heads": 2**40, "num_key_value_heads": 2**40},
    {"head_dim": 2**62},
    {"max_position_embeddings": 10**30},
    {"rms_norm_eps": 10**400},
]


@pytest.mark.parametrize("change", ABSURD, ids=str)
def test_sizes_that_no_model_has(change: dict[str, Any], teacher: Path, supernet: Path, tmp_path: Path):
    for directory in (teacher, supernet):
        config = json.loads((directory / "config.json").read_text())
        (directory / "config.json").write_text(json.dumps(config | change))
    refused(lambda: convert_teacher(teacher, tmp_path / "out"))
    if "num_attention_heads" in change:
        return  # a supernet's mixers have their own heads
    refused(lambda: load_supernet(supernet))


@pytest.mark.parametrize(
    "change",
    [{"num_heads": 2**40, "num_key_value_heads": 1}, {"head_dim": 2**62}, {"head_dim": 10**30}],
    ids=str,
)
def test_mixers_that_no_model_has(change: dict[str, int], supernet: Path):
    config = json.loads((supernet / "config.json").read_text())
    config["mixers"]["full_attention"] |= change
    (supernet / "config.json").write_text(json.dumps(config))
    refused(lambda: load_supernet(supernet))


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "notes.txt", "generation_config.json"])
def test_a_link_to_somebodys_secret_is_not_copied_along(
    name: str, teacher: Path, supernet: Path, tmp_path: Path
):
    (tmp_path / "secret").write_text('{"key": "hunter2"}')
    for directory in (teacher, supernet):
        (directory / name).unlink(missing_ok=True)
        (directory / name).symlink_to(tmp_path / "secret")
    assert f"{name} is a link to " in refused(lambda: convert_teacher(teacher, tmp_path / "out"))
    if name != "config.json":
        assert f"{name} is a link to " in refused(lambda: load_supernet(supernet))
    assert not (tmp_path / "out").exists()


def test_links_of_the_folder_with_extra_tensors_are_not_followed(supernet: Path, tmp_path: Path):
    model = load_supernet(supernet)
    (tmp_path / "secret").write_text("hunter2")
    (supernet / "teacher_extra").mkdir()
    (supernet / "teacher_extra" / WEIGHTS).symlink_to(tmp_path / "secret")
    assert "is a link to " in refused(lambda: save_supernet(model, tmp_path / "out", source=supernet))
    assert not (tmp_path / "out").exists()


def change_weights(directory: Path, change: Callable[[Tensor], Tensor]) -> None:
    tensors = load_file(directory / WEIGHTS)
    tensors[NORM] = change(tensors[NORM])
    save_file(tensors, directory / WEIGHTS, metadata={"format": "pt"})


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_one_number_that_is_none(value: float, teacher: Path, supernet: Path, tmp_path: Path):
    for directory in (teacher, supernet):
        change_weights(directory, lambda tensor: tensor.index_fill(0, torch.tensor(3), value))
    for read in (lambda: convert_teacher(teacher, tmp_path / "out"), lambda: load_supernet(supernet)):
        assert f"{WEIGHTS}: {NORM} holds infinities or what is not a number" in refused(read)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("dtype", [torch.int64, torch.uint8, torch.bool, torch.float8_e4m3fn])
def test_weights_that_are_no_plain_numbers(dtype: torch.dtype, teacher: Path, supernet: Path, tmp_path: Path):
    for directory in (teacher, supernet):
        change_weights(directory, lambda tensor: tensor.to(dtype))
    for read in (lambda: convert_teacher(teacher, tmp_path / "out"), lambda: load_supernet(supernet)):
        said = refused(read)
        assert NORM in said
        assert "expected F64 or F32 or F16 or BF16: dequantise the model first" in said

"""A supernet directory: what loads, what is refused, and that writing it is all or nothing."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM
from transformers.utils import logging

import gearshift
from gearshift.errors import OutputExistsError
from gearshift.supernet import (
    CheckpointError,
    ConfigError,
    SupernetForCausalLM,
    checkpoint_digest,
    load_supernet,
    save_supernet,
)
from gearshift.supernet.shards import ShardWriter
from gearshift.supernet.tensor_files import info_of

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
NEEDED = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "head_dim",
    "mixers",
)


@pytest.fixture
def supernet(supernet_directory: Path, tmp_path: Path) -> Path:
    """A copy to spoil."""
    return shutil.copytree(supernet_directory, tmp_path / "supernet")


@pytest.fixture(scope="module")
def model(supernet_directory: Path) -> SupernetForCausalLM:
    return load_supernet(supernet_directory)


def edit_config(directory: Path, drop: str = "", **fields: Any) -> None:
    path = directory / "config.json"
    config = {**json.loads(path.read_text()), **fields}
    config.pop(drop, None)
    path.write_text(json.dumps(config))


def edit_weights(directory: Path, edit: Callable[[dict[str, Tensor]], object]) -> None:
    tensors = load_file(directory / WEIGHTS)
    edit(tensors)
    save_file(tensors, directory / WEIGHTS, metadata={"format": "pt"})


def shard(directory: Path) -> list[Path]:
    """Spread the weights over several files."""
    tensors = load_file(directory / WEIGHTS)
    (directory / WEIGHTS).unlink()
    with ShardWriter(
        directory, {name: info_of(tensor) for name, tensor in tensors.items()}, 40_000
    ) as writer:
        for name, tensor in tensors.items():
            writer.write(name, tensor)
    return sorted(directory.glob("*.safetensors"))


# Reading


def test_what_is_saved_loads_again(model: SupernetForCausalLM, supernet_directory: Path, tmp_path: Path):
    out = save_supernet(model, tmp_path / "new" / "out", source=supernet_directory)
    again = load_supernet(out)
    assert all(torch.equal(tensor, again.state_dict()[name]) for name, tensor in model.state_dict().items())
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        assert (out / name).read_bytes() == (supernet_directory / name).read_bytes()
    assert not again.training


def test_shards_load_as_one_file_does(supernet: Path, model: SupernetForCausalLM):
    assert len(shard(supernet)) > 2
    given = load_supernet(supernet).state_dict()
    assert all(torch.equal(tensor, given[name]) for name, tensor in model.state_dict().items())
    assert load_supernet(supernet, dtype=torch.bfloat16).dtype == torch.bfloat16


@pytest.mark.parametrize("load", [load_supernet, AutoModelForCausalLM.from_pretrained])
@pytest.mark.parametrize("key", NEEDED)
def test_a_needed_key_that_is_gone_is_named(key: str, load: Callable[[Path], object], supernet: Path):
    edit_config(supernet, drop=key)
    with pytest.raises(ConfigError, match=f"has no '{key}'"):
        load(supernet)


@pytest.mark.parametrize("key", ["hidden_act", "rms_norm_eps", "rope_parameters"])
def test_a_key_that_no_weight_betrays_is_needed_too(key: str, supernet: Path):
    edit_config(supernet, drop=key)
    with pytest.raises(ConfigError, match=f"config.json has no '{key}'"):
        load_supernet(supernet)


def test_a_directory_that_is_no_supernet(teacher_directory: Path, supernet: Path, tmp_path: Path):
    with pytest.raises(CheckpointError, match="nowhere: there is no config.json"):
        load_supernet(tmp_path / "nowhere")
    with pytest.raises(CheckpointError, match="model_type 'llama'; expected 'gearshift_supernet'"):
        load_supernet(teacher_directory)
    for content, said in (("{", "is not valid JSON"), ("[1]", "holds no JSON object")):
        (supernet / "config.json").write_text(content)
        with pytest.raises(CheckpointError, match=f"config.json {said}"):
            load_supernet(supernet)


@pytest.mark.parametrize("change", [{"hidden_act": "gelou"}, {"rope_parameters": {"rope_type": "gelou"}}])
def test_a_name_that_transformers_does_not_know(change: dict[str, Any], supernet: Path):
    edit_config(supernet, **change)
    with pytest.raises(ConfigError, match="does not know 'gelou'"):
        load_supernet(supernet)


@pytest.mark.parametrize("length", [0, 4, 8, 100, 5000, -1000, -1])
def test_truncated_weights_are_refused(length: int, supernet: Path):
    content = (supernet / WEIGHTS).read_bytes()
    (supernet / WEIGHTS).write_bytes(content[:length])
    with pytest.raises(CheckpointError, match=r"model\.safetensors is truncated or damaged"):
        load_supernet(supernet)


@pytest.mark.parametrize("content", [b"garbage", b"\xff" * 5000, b"\x10" + b"\0" * 7 + b"{" * 16])
def test_garbage_for_weights_is_refused(content: bytes, supernet: Path):
    (supernet / WEIGHTS).write_bytes(content)
    with pytest.raises(CheckpointError, match=r"model\.safetensors is truncated or damaged"):
        load_supernet(supernet)


def test_missing_weights_are_named(supernet: Path):
    shards = shard(supernet)
    shards[1].unlink()
    with pytest.raises(CheckpointError, match=f"{shards[1].name} is missing"):
        load_supernet(supernet)
    (supernet / INDEX).unlink()
    with pytest.raises(CheckpointError, match=f"{INDEX} is missing, which says what is in {shards[0].name}"):
        load_supernet(supernet)
    for path in shards:
        path.unlink(missing_ok=True)
    with pytest.raises(CheckpointError, match=r"model\.safetensors is missing; restore it"):
        load_supernet(supernet)


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"placement": "fa*9"}, "the placement 'fa.9' has 9 layers; expected 3"),
        ({"hidden_size": 0}, "hidden_size is 0; expected a positive int"),
        ({"pad_token_id": 257}, "pad_token_id is 257; expected a token of the vocabulary of 257, or null"),
        ({"pad_token_id": "<pad>"}, "pad_token_id is '<pad>'; expected a token of the vocabulary"),
        ({"rope_parameters": 7}, "is refused: 'int' object is not iterable"),
        ({"dtype": "float33"}, "is refused: .*float33"),
    ],
    ids=str,
)
def test_a_value_that_cannot_be_is_named_with_its_config(fields: dict[str, Any], said: str, supernet: Path):
    edit_config(supernet, **fields)
    with pytest.raises(ConfigError, match=f"{supernet / 'config.json'}:? {said}"):
        load_supernet(supernet)


@pytest.mark.parametrize(
    "fields",
    [
        {"hidden_act": ["silu"]},
        {"rope_parameters": {"rope_type": "default", "rope_theta": "10000"}},
        {"rope_parameters": {"rope_type": ["default"], "rope_theta": 1e4}},
    ],
    ids=str,
)
def test_a_value_over_which_transformers_trips_is_shown(fields: dict[str, Any], supernet: Path):
    edit_config(supernet, **fields)
    with pytest.raises(ConfigError, match="Transformers refuses the config .*; restore config.json"):
        load_supernet(supernet)


def test_a_truncated_shard_is_named(supernet: Path):
    second = shard(supernet)[1]
    second.write_bytes(second.read_bytes()[:-8])
    with pytest.raises(CheckpointError, match=f"{second.name} is truncated"):
        load_supernet(supernet)


@pytest.mark.parametrize(
    ("index", "said"),
    [
        ('{"weight_map": {"a": "gone.safetensors"}}', r"gone\.safetensors is missing"),
        ('{"weight_map": {"a": "../supernet/model.safetensors"}}', "expected a file in the same directory"),
        ('{"weight_map": {"a": "/etc/passwd"}}', "expected a file in the same directory"),
        ('{"weight_map": {"a": ".."}}', "is missing"),
        ('{"weight_map": {}}', "lacks"),
        ('{"weight_map": ["a"]}', "has no weight_map"),
        ("{}", "has no weight_map"),
        ("[]", "holds no JSON object"),
        ("{", "is not valid JSON"),
    ],
)
def test_a_wrong_index_is_refused(index: str, said: str, supernet: Path):
    (supernet / WEIGHTS).unlink()
    (supernet / INDEX).write_text(index)
    with pytest.raises(CheckpointError, match=said):
        load_supernet(supernet)


NORM = "model.layers.1.input_layernorm.weight"
WRONG_TENSORS: dict[str, tuple[Callable[[dict[str, Tensor]], object], str]] = {
    "missing": (lambda tensors: tensors.pop(NORM), f"lacks 1 tensors .such as {NORM}"),
    "surplus": (lambda tensors: tensors.update(other=torch.ones(1)), "surplus 1 tensors .such as other"),
    "shape": (
        lambda tensors: tensors.update({NORM: torch.ones(31)}),
        rf"{NORM} has shape \(31,\); .*\(32,\)",
    ),
    "turned": (
        lambda tensors: tensors.update(
            {"model.embed_tokens.weight": tensors["model.embed_tokens.weight"].T.contiguous()}
        ),
        "model.embed_tokens.weight has shape",
    ),
}


@pytest.mark.parametrize("kind", WRONG_TENSORS)
def test_weights_that_do_not_belong_to_the_config_are_refused(kind: str, supernet: Path):
    edit, said = WRONG_TENSORS[kind]
    edit_weights(supernet, edit)
    with pytest.raises(CheckpointError, match=said):
        load_supernet(supernet)


def test_loading_and_saving_draw_no_bars_and_change_no_settings(
    supernet: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(logging, "_tqdm_active", True)
    drawn: list[object] = []

    def hook(factory: Callable[..., Any], given: tuple[Any, ...], options: dict[str, Any]) -> object:
        drawn.append(options.get("desc"))
        return logging.EmptyTqdm(*given, **options)

    before = logging.set_tqdm_hook(hook)
    try:
        save_supernet(load_supernet(supernet), tmp_path / "out")
        assert drawn == []
        with pytest.raises(CheckpointError):
            load_supernet(tmp_path)
        AutoModelForCausalLM.from_pretrained(supernet)
        assert drawn == ["Loading weights"]
    finally:
        assert logging.set_tqdm_hook(before) is hook
    assert logging.is_progress_bar_enabled()
    assert capfd.readouterr().err == ""


# Writing


def test_an_output_that_exists_is_kept_unless_asked(model: SupernetForCausalLM, tmp_path: Path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.txt").touch()
    with pytest.raises(OutputExistsError, match="already exists"):
        save_supernet(model, tmp_path / "out")
    save_supernet(model, tmp_path / "out", overwrite=True)
    assert not (tmp_path / "out" / "thesis.txt").exists()
    save_supernet(model, tmp_path / "out", source=tmp_path / "out", overwrite=True)  # onto its own source
    load_supernet(tmp_path / "out")


FULL = os.strerror(errno.ENOSPC)
FAILURES = [
    ("transformers.modeling_utils.safe_save_file", OSError(errno.ENOSPC, FULL), "no space left on the disk"),
    ("transformers.modeling_utils.safe_save_file", SafetensorError(f"{FULL} (os error 28)"), "no space left"),
    ("shutil.copyfile", OSError(errno.ENOSPC, FULL), "no space left on the disk"),
    ("shutil.copyfile", PermissionError(errno.EACCES, os.strerror(errno.EACCES)), "Permission denied"),
    ("transformers.modeling_utils.safe_save_file", KeyboardInterrupt(), None),
    ("shutil.copyfile", KeyboardInterrupt(), None),
]


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize(("function", "error", "said"), FAILURES)
def test_a_write_that_fails_leaves_what_was_there(
    function: str,
    error: BaseException,
    said: str | None,
    overwrite: bool,
    model: SupernetForCausalLM,
    supernet: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
):
    out = tmp_path / "out"
    if overwrite:
        out.mkdir()
        (out / "old").touch()

    def fail(*arguments: object, **options: object) -> None:
        raise error

    monkeypatch.setattr(function, fail)
    expected = KeyboardInterrupt if isinstance(error, KeyboardInterrupt) else CheckpointError
    with pytest.raises(expected, match=said):
        save_supernet(model, out, source=supernet, overwrite=overwrite)
    assert {path.name for path in tmp_path.iterdir()} == {"supernet", *(["out"] if overwrite else [])}
    assert not overwrite or [path.name for path in out.iterdir()] == ["old"]


def test_a_killed_save_leaves_nothing_under_the_final_name(supernet: Path, tmp_path: Path):
    program = (
        "import os, signal, sys, shutil; from gearshift.supernet import load_supernet, save_supernet\n"
        "model = load_supernet(sys.argv[1])\n"
        "shutil.copyfile = lambda *paths: os.kill(os.getpid(), signal.SIGKILL)\n"
        "save_supernet(model, sys.argv[2], source=sys.argv[1])\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(Path(gearshift.__file__).parents[1])}
    command = [sys.executable, "-c", program, str(supernet), str(tmp_path / "out")]
    assert subprocess.run(command, env=environment, check=False).returncode == -signal.SIGKILL
    assert not (tmp_path / "out").exists()


# Its name


def test_the_digest_names_weights_and_sizes_alone(supernet: Path):
    before = checkpoint_digest(supernet)
    assert len(bytes.fromhex(before)) == 8
    edit_config(supernet, placement="kda*3", transformers_version="0")
    (supernet / "presets.json").write_text("{}")
    (supernet / "tokenizer.json").unlink()
    assert checkpoint_digest(supernet) == before
    edit_config(supernet, rms_norm_eps=1e-3)
    assert checkpoint_digest(supernet) != before


def test_the_digest_changes_with_one_weight(supernet: Path):
    before = checkpoint_digest(supernet)
    edit_weights(supernet, lambda tensors: None)
    assert checkpoint_digest(supernet) == before
    edit_weights(supernet, lambda tensors: tensors[NORM][3].add_(1e-3))
    assert checkpoint_digest(supernet) != before
    with pytest.raises(CheckpointError):
        checkpoint_digest(supernet / "nowhere")

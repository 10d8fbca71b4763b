"""``gearshift info``: what it finds, and what it says is missing."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from transformers import LlamaForCausalLM
from typer.testing import CliRunner, Result

from gearshift.cli import app
from gearshift.errors import CheckpointError, FileFormatError
from gearshift.files import append_json_line
from gearshift.inspect_directory import (
    ATTENTION,
    SHARED,
    DirectoryError,
    inspect_directory,
    supernet_space,
)
from gearshift.placement import MIXERS, Placement
from gearshift.presets import Preset, write_presets
from gearshift.supernet import load_supernet, save_supernet
from gearshift.tensor_headers import read_header
from tests.supernet.tools import only_holding


def info(path: Path) -> Result:
    return CliRunner().invoke(app, ["info", str(path)], env={"COLUMNS": "200"})


@pytest.fixture
def supernet(supernet_directory: Path, tmp_path: Path) -> Path:
    """A supernet directory to damage."""
    return shutil.copytree(supernet_directory, tmp_path / "supernet")


def test_counts_agree_with_the_loaded_models(teacher_directory: Path, supernet_directory: Path):
    teacher, supernet = inspect_directory(teacher_directory), inspect_directory(supernet_directory)
    model, loaded = LlamaForCausalLM.from_pretrained(teacher_directory), load_supernet(supernet_directory)
    assert teacher.parameters.total() == sum(p.numel() for p in model.parameters())
    assert supernet.parameters.total() == sum(p.numel() for p in loaded.parameters())
    assert supernet.bytes.total() == sum(p.nbytes for p in loaded.parameters())
    for mixer in MIXERS:
        own = [p.numel() for name, p in loaded.named_parameters() if f".mixers.{mixer}." in name]
        assert supernet.parameters[mixer] == sum(own) > 0


def test_a_supernets_shared_weights_and_full_attention_are_the_teachers(
    teacher_directory: Path, supernet_directory: Path
):
    teacher, supernet = inspect_directory(teacher_directory), inspect_directory(supernet_directory)
    assert (teacher.kind, supernet.kind) == ("teacher", "supernet")
    assert set(teacher.parameters) == {SHARED, ATTENTION}
    assert set(supernet.parameters) == {SHARED, *MIXERS}
    assert supernet.parameters[SHARED] == teacher.parameters[SHARED]
    assert supernet.parameters["full_attention"] == teacher.parameters[ATTENTION]


def test_a_whole_directory_is_printed_with_its_presets(supernet: Path):
    write_presets(supernet, [Preset("fast", Placement.parse("fa gdn*2"), retention=0.931)])
    result = info(supernet)
    assert result.exit_code == 0
    assert "a supernet directory" in result.output
    assert "fa gdn*2" in result.output
    assert "93.1%" in result.output


def test_a_truncated_file_is_named(supernet: Path):
    weights = supernet / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    result = info(supernet)
    assert result.exit_code == 1
    assert f"error: {supernet} is not complete; missing: {weights} is truncated or damaged" in result.stderr


@pytest.mark.parametrize(
    "content", [b"", b"\xff" * 64, b"\x02\0\0\0\0\0\0\0[]", b"\x08\0\0\0\0\0\0\0nonsense"]
)
def test_a_file_of_another_kind_is_refused(content: bytes, tmp_path: Path):
    path = tmp_path / "model.safetensors"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match="truncated or damaged"):
        read_header(path)


def test_missing_weights_tokenizer_and_shards_are_all_said(supernet: Path):
    (supernet / "model.safetensors").unlink()
    (supernet / "tokenizer.json").unlink()
    assert "model.safetensors is missing" in inspect_directory(supernet).missing[0]
    index = {"weight_map": {"model.norm.weight": "model-00001-of-00002.safetensors"}}
    (supernet / "model.safetensors.index.json").write_text(json.dumps(index))
    missing = "; ".join(inspect_directory(supernet).missing)
    assert "model-00001-of-00002.safetensors is missing" in missing
    assert "weights of kimi_delta_attention in layers 0, 1, 2" in missing
    assert "tokenizer.json" in missing


@pytest.mark.parametrize("weight_map", [None, ["a"], {"a": "../secret.safetensors"}, {"a": 3}])
def test_an_index_that_lies_is_refused(weight_map: object, supernet: Path):
    (supernet / "model.safetensors").unlink()
    (supernet / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    assert "weight_map" in inspect_directory(supernet).missing[0]
    assert info(supernet).exit_code == 1


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"num_hidden_layers": "three"}, "num_hidden_layers is 'three'"),
        ({"num_hidden_layers": True}, "num_hidden_layers is True"),
        ({"mixers": None}, "mixers is a NoneType"),
        ({"mixers": {"mamba": {}}}, "unknown mixer 'mamba'"),
        ({"layer_mixers": {"full_attention": {}}}, "layer_mixers is no list of objects"),
        ({"layer_mixers": [["full_attention"]] * 3}, "layer_mixers is no list of objects"),
        ({"layer_mixers": [{"full_attention": {}}]}, "the mixers of 1 layers; expected those of 3"),
    ],
)
def test_a_config_that_is_no_supernets_is_refused(change: dict[str, object], said: str, supernet: Path):
    path = supernet / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(FileFormatError, match=said):
        supernet_space(supernet)


def test_the_space_of_a_supernet_and_of_nothing_else(supernet: Path, teacher_directory: Path, tmp_path: Path):
    assert supernet_space(supernet) == load_supernet(supernet).placement_space
    with pytest.raises(DirectoryError, match="holds a model of type 'llama'; expected 'gearshift_supernet'"):
        supernet_space(teacher_directory)
    with pytest.raises(DirectoryError, match="it has no config.json"):
        supernet_space(tmp_path / "nothing")


HELD = [
    ("full_attention", "kimi_delta_attention"),
    ("full_attention",),
    ("full_attention", "gated_delta_net"),
]


def test_layers_that_hold_different_mixers(supernet_directory: Path, tmp_path: Path):
    thin = only_holding(load_supernet(supernet_directory), HELD)
    directory = save_supernet(thin, tmp_path / "thin", source=supernet_directory)
    assert supernet_space(directory) == thin.placement_space
    assert supernet_space(directory).layers == tuple(HELD)
    assert inspect_directory(directory).missing == []
    (directory / "model.safetensors").unlink()
    missing = "; ".join(inspect_directory(directory).missing)
    assert "weights of gated_delta_net in layers 2; weights of kimi_delta_attention in layers 0" in missing


def test_no_directory_and_an_unknown_one(tmp_path: Path):
    nowhere, empty = info(tmp_path / "nowhere"), info(tmp_path)
    assert (nowhere.exit_code, empty.exit_code) == (1, 1)
    assert "nowhere is not a directory; expected a teacher, supernet or run directory" in nowhere.stderr
    assert "holds neither config.json nor recipe.yaml" in empty.stderr


def test_a_run_directory_says_how_far_it_is(tmp_path: Path, supernet_directory: Path):
    (tmp_path / "recipe.yaml").write_text("steps: 10\n")
    assert "start it again" in inspect_directory(tmp_path).missing[-1]
    append_json_line(tmp_path / "metrics.jsonl", {"step": 4, "loss": 1.25, "placements": ["fa*3"]})
    (tmp_path / "checkpoint").mkdir()
    stopped = inspect_directory(tmp_path)
    assert (stopped.kind, stopped.facts) == ("run", {"step": "4", "loss": "1.25"})
    assert "go on with --resume" in stopped.missing[0]
    shutil.copytree(supernet_directory, tmp_path / "supernet")
    assert inspect_directory(tmp_path).missing == []

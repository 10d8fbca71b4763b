"""Thinning: fewer mixers, and the same logits at every preset that was kept."""

from __future__ import annotations

import errno
import json
from io import BufferedIOBase
from pathlib import Path
from shutil import copytree
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM

from gearshift.convert import convert_teacher
from gearshift.convert.export import export_placement
from gearshift.convert.source import ExportError
from gearshift.convert.thin import thin_supernet
from gearshift.errors import CheckpointError, OutputExistsError
from gearshift.inspect_directory import inspect_directory
from gearshift.placement import Placement, PlacementError, long_name
from gearshift.presets import Measurement, Preset, PresetError, read_presets, write_presets
from gearshift.supernet import load_supernet
from gearshift.supernet.tensor_files import TensorFiles
from gearshift.workload import Workload
from tests.convert.teachers.test_qwen2 import MIXED
from tests.convert.tiny_teachers import SIZES, Variant, all_tensors, random_tokens, same_tensors, save_teacher

PLACEMENTS = {
    "teacher": "fa*3",
    "good": "fa swa kda",
    "fast": "gdn*3",
    "mixture": "gdn swa gdn",
    "other": "kda*3",
}
MEASURED = Measurement(
    Workload(context_length=2048), seconds_per_token=0.5, speed_up=2.0, hardware="an abacus"
)


@pytest.fixture(params=["llama", "sharded, tied", "own windows"])
def supernet(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """Three layers of all four mixers, with presets."""
    teacher = tmp_path / "teacher"
    sizes: dict[str, Any] = SIZES | {"num_hidden_layers": 3}
    if request.param == "own windows":
        save_teacher(Qwen2ForCausalLM, Qwen2Config(**sizes | MIXED), Variant(), teacher)
    else:
        sharded = request.param == "sharded, tied"
        variant = Variant(max_shard_size="20KB" if sharded else "1GB")
        save_teacher(LlamaForCausalLM, LlamaConfig(**sizes, tie_word_embeddings=sharded), variant, teacher)
    directory = convert_teacher(teacher, tmp_path / "supernet", window=12)
    presets = [
        Preset(name, Placement.parse(text), quality=0.25, retention=0.5, measurements=(MEASURED,))
        for name, text in PLACEMENTS.items()
    ]
    write_presets(directory, presets)
    return directory


@torch.no_grad()
def check_same_logits(thin: Path, supernet: Path, presets: list[str]) -> None:
    given, expected = load_supernet(thin), load_supernet(supernet)
    for name in presets:
        logits = expected(random_tokens(), placement=PLACEMENTS[name]).logits
        assert logits.std() > 0.01
        assert torch.equal(given(random_tokens(), placement=PLACEMENTS[name]).logits, logits)


def test_presets_that_were_kept_compute_the_same_and_nothing_else_is_left(supernet: Path, tmp_path: Path):
    thinned = thin_supernet(supernet, tmp_path / "thin", ["fast", "good"])
    assert thinned.layers == tuple(
        tuple(map(long_name, held)) for held in (("fa", "gdn"), ("swa", "gdn"), ("gdn", "kda"))
    )
    check_same_logits(tmp_path / "thin", supernet, ["fast", "good", "mixture"])
    assert load_supernet(tmp_path / "thin").placement_space.size == 8
    before, after = (sum(t.nbytes for t in all_tensors(d).values()) for d in (supernet, tmp_path / "thin"))
    assert (thinned.nbytes, thinned.saved) == (after, before - after)
    assert after < 0.7 * before
    whole = all_tensors(supernet)
    assert all(torch.equal(tensor, whole[name]) for name, tensor in all_tensors(tmp_path / "thin").items())


def test_what_was_measured_of_presets_stays(supernet: Path, tmp_path: Path):
    thinned = thin_supernet(supernet, tmp_path / "thin", ["fast", "good"])
    kept, all_presets = read_presets(tmp_path / "thin"), read_presets(supernet)
    assert thinned.presets == tuple(kept) == ("good", "fast", "mixture")
    assert kept == {name: all_presets[name] for name in kept}


@pytest.mark.parametrize(
    ("presets", "default"), [(["fast", "good"], "gdn*3"), (["good", "teacher"], "fa*3"), (["other"], "kda*3")]
)
def test_the_default_stays_or_is_the_first_preset(
    presets: list[str], default: str, supernet: Path, tmp_path: Path
):
    assert thin_supernet(supernet, tmp_path / "thin", presets).default == default
    assert str(load_supernet(tmp_path / "thin").placement) == default


def test_info_says_what_is_left(supernet: Path, tmp_path: Path):
    thin_supernet(supernet, tmp_path / "thin", ["fast", "good"])
    (tmp_path / "thin" / "tokenizer.json").touch()
    thin, whole = inspect_directory(tmp_path / "thin"), inspect_directory(supernet)
    assert thin.missing == []
    assert list(thin.presets) == ["good", "fast", "mixture"]
    for mixer, layers in {"fa": 1, "swa": 1, "gdn": 3, "kda": 1}.items():
        name = long_name(mixer)
        assert thin.parameters[name] * 3 == whole.parameters[name] * layers
    assert thin.parameters["shared"] == whole.parameters["shared"]


def test_a_thin_one_can_be_thinned_again_and_exported(supernet: Path, tmp_path: Path):
    thin_supernet(supernet, tmp_path / "thin", ["teacher", "fast", "good"])
    thin_supernet(tmp_path / "thin", tmp_path / "thinner", ["teacher"])
    thin_supernet(supernet, tmp_path / "at once", ["teacher"])
    assert (tmp_path / "thinner/config.json").read_text() == (tmp_path / "at once/config.json").read_text()
    for directory in ("thin", "thinner"):
        out = export_placement(tmp_path / directory, tmp_path / f"from {directory}", "fa*3").path
        assert same_tensors(out, tmp_path / "teacher")
        assert (out / "config.json").read_bytes() == (tmp_path / "teacher/config.json").read_bytes()


def test_the_teacher_goes_unless_it_is_named(supernet: Path, tmp_path: Path):
    thin_supernet(supernet, tmp_path / "thin", ["fast", "other"])
    with pytest.raises(PlacementError, match="this model holds only gdn, kda"):
        export_placement(tmp_path / "thin", tmp_path / "out", "fa*3")
    with pytest.raises(PlacementError, match="full_attention"):
        load_supernet(tmp_path / "thin").placement_space.teacher()


def test_layers_that_are_alike_need_no_list(tmp_path: Path, supernet_directory: Path):
    supernet = copytree(supernet_directory, tmp_path / "supernet")
    write_presets(supernet, [Preset(name, Placement.parse(text)) for name, text in PLACEMENTS.items()])
    thin_supernet(supernet, tmp_path / "thin", ["fast", "other"])
    config = json.loads((tmp_path / "thin" / "config.json").read_text())
    assert set(config["mixers"]) == {"gated_delta_net", "kimi_delta_attention"}
    assert "layer_mixers" not in config
    assert (tmp_path / "thin/tokenizer.json").read_bytes() == (supernet / "tokenizer.json").read_bytes()


@pytest.fixture
def plain(supernet_directory: Path, tmp_path: Path) -> Path:
    supernet = copytree(supernet_directory, tmp_path / "supernet")
    write_presets(
        supernet, [Preset("fast", Placement.parse("gdn*3")), Preset("good", Placement.parse("fa*3"))]
    )
    return supernet


def test_presets_that_are_not_there(plain: Path, supernet_directory: Path, tmp_path: Path):
    with pytest.raises(PresetError, match="no preset 'quick'; this supernet's presets: fast, good"):
        thin_supernet(plain, tmp_path / "out", ["fast", "quick"])
    with pytest.raises(PresetError, match="presets: none yet"):
        thin_supernet(supernet_directory, tmp_path / "out", ["fast"])
    with pytest.raises(ExportError, match="no preset is named"):
        thin_supernet(plain, tmp_path / "out", [])
    assert not (tmp_path / "out").exists()


def test_outputs_in_the_way_and_sources_that_are_not_whole(plain: Path, tmp_path: Path):
    with pytest.raises(ExportError, match="would replace the supernet"):
        thin_supernet(plain, plain, ["fast"], overwrite=True)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.txt").touch()
    with pytest.raises(OutputExistsError):
        thin_supernet(plain, tmp_path / "out", ["fast"])
    assert thin_supernet(plain, tmp_path / "out", ["fast"], overwrite=True).presets == ("fast",)
    weights = plain / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    with pytest.raises(CheckpointError, match="truncated or damaged"):
        thin_supernet(plain, tmp_path / "more", ["fast"])
    assert not (tmp_path / "more").exists()


def test_a_full_disk_keeps_what_was_there(plain: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.txt").touch()

    def full(self: TensorFiles, name: str, target: BufferedIOBase) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(TensorFiles, "copy_to", full)
    with pytest.raises(CheckpointError, match="no space left on the disk"):
        thin_supernet(plain, tmp_path / "out", ["fast"], overwrite=True)
    assert {path.name for path in tmp_path.iterdir()} == {"supernet", "out"}
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["thesis.txt"]

"""Conversion: the supernet computes what its teacher computes, and a wrong teacher or output is refused."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaForCausalLM

import gearshift.convert.convert as convert_module
from gearshift.convert import ConversionError, convert_teacher, supported_architectures
from gearshift.errors import GearshiftError, OutputExistsError
from gearshift.supernet import CheckpointError, load_supernet

MakeTeacher = Callable[..., Path]
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
TEACHERS: dict[str, dict[str, Any]] = {
    "grouped heads": {},
    "tied embeddings": {"tie_word_embeddings": True},
    "one key/value head": {"num_key_value_heads": 1},
    "no groups": {"num_key_value_heads": 4},
    "llama3 rotary embeddings": {"rope_parameters": LLAMA3},
    "wide heads": {"head_dim": 16},
    "biases in the FFN": {"mlp_bias": True},
    "sharded": {"max_shard_size": "20KB"},
    "bfloat16": {"dtype": torch.bfloat16},
}


def tokens(length: int = 40) -> Tensor:
    return torch.randint(0, 61, (2, length), generator=torch.Generator().manual_seed(3))


def all_tensors(directory: Path) -> dict[str, Tensor]:
    return {k: v for path in sorted(directory.glob("*.safetensors")) for k, v in load_file(path).items()}


def edit_config(directory: Path, drop: str = "", **fields: Any) -> None:
    path = directory / "config.json"
    config = {**json.loads(path.read_text()), **fields}
    config.pop(drop, None)
    path.write_text(json.dumps(config))


@torch.no_grad()
@pytest.mark.parametrize("kind", TEACHERS)
def test_all_full_attention_is_the_teacher(kind: str, make_teacher: MakeTeacher, tmp_path: Path):
    teacher = make_teacher(**TEACHERS[kind])
    assert (kind == "sharded") == (len(list(teacher.glob("*.safetensors"))) > 1)
    out = convert_teacher(teacher, tmp_path / "out", window=40)
    expected = LlamaForCausalLM.from_pretrained(teacher, dtype=torch.float32)(tokens()).logits
    supernet = load_supernet(out)
    for placement in ("fa*2", "swa*2"):  # a window as long as the text hides nothing
        given = supernet(tokens(), placement=placement).logits
        assert (given - expected).abs().max() < 1e-4
        assert torch.equal(given.argmax(-1), expected.argmax(-1))
    by_auto_class = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32)
    assert torch.equal(by_auto_class(tokens()).logits, supernet(tokens()).logits)
    assert expected.std() > 0.01  # a teacher that says nothing proves nothing


@pytest.mark.parametrize("kind", ["grouped heads", "sharded", "bfloat16"])
def test_copied_tensors_are_the_teachers_bit_for_bit(kind: str, make_teacher: MakeTeacher, tmp_path: Path):
    teacher = make_teacher(**TEACHERS[kind])
    given = all_tensors(convert_teacher(teacher, tmp_path / "out"))
    for name, tensor in all_tensors(teacher).items():
        copies = [name]
        if ".self_attn." in name:
            copies = [name.replace("self_attn", f"mixers.{m}_attention") for m in ("full", "sliding")]
        for copy in copies:
            assert given[copy].dtype == tensor.dtype
            assert torch.equal(given[copy], tensor)


@torch.no_grad()
def test_a_short_window_hides_what_lies_behind_it(make_teacher: MakeTeacher, tmp_path: Path):
    supernet = load_supernet(convert_teacher(make_teacher(), tmp_path / "out", window=4))
    full, sliding = (supernet(tokens(), placement=placement).logits for placement in ("fa*2", "swa*2"))
    assert (full[:, :4] - sliding[:, :4]).abs().max() < 1e-5
    assert (full[:, 20:] - sliding[:, 20:]).abs().max() > 1e-3


@pytest.mark.parametrize(("context", "window"), [(128, 16), (65536, 4096), (4, 1)])
def test_the_window_follows_the_context(context: int, window: int, make_teacher: MakeTeacher, tmp_path: Path):
    out = convert_teacher(make_teacher(max_position_embeddings=context), tmp_path / "out")
    assert json.loads((out / "config.json").read_text())["mixers"]["sliding_attention"]["window"] == window


def test_only_the_mixers_asked_for(make_teacher: MakeTeacher, tmp_path: Path):
    mixers = ("full_attention", "gated_delta_net")
    supernet = load_supernet(convert_teacher(make_teacher(), tmp_path / "out", mixers=mixers))
    assert supernet.placement_space.mixers == mixers
    assert {name.split(".")[4] for name in supernet.state_dict() if ".mixers." in name} == set(mixers)
    assert str(supernet.placement) == "fa*2"


def test_a_seed_repeats_and_moves_only_the_random_projections(make_teacher: MakeTeacher, tmp_path: Path):
    teacher = make_teacher()
    first, again, other = (
        all_tensors(convert_teacher(teacher, tmp_path / str(run), seed=seed))
        for run, seed in enumerate((0, 0, 7))
    )
    assert all(torch.equal(tensor, again[name]) for name, tensor in first.items())
    moved = {name for name, tensor in first.items() if not torch.equal(tensor, other[name])}
    prefixes = [f"model.layers.{layer}.mixers.kimi_delta_attention" for layer in range(2)]
    assert moved == {f"{prefix}.{gate}_a_proj.weight" for prefix in prefixes for gate in "fg"}


def test_companions_come_along(make_teacher: MakeTeacher, tmp_path: Path):
    teacher = make_teacher(max_shard_size="20KB")
    (teacher / "pytorch_model.bin.index.json").write_text("{}")
    (teacher / "chat_template.jinja").write_text("{{ messages }}")
    (teacher / "generation_config.json").write_text('{"temperature": 0.5, "do_sample": true}')
    out = convert_teacher(teacher, tmp_path / "out")
    for name in ("chat_template.jinja", "generation_config.json"):
        assert (out / name).read_bytes() == (teacher / name).read_bytes()
    assert (out / "teacher_config.json").read_bytes() == (teacher / "config.json").read_bytes()
    names = {"chat_template.jinja", "generation_config.json", "config.json", "model.safetensors"}
    assert {path.name for path in out.iterdir()} == {*names, "teacher_config.json"}
    assert load_supernet(out).generation_config.temperature == 0.5


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"mixers": ("sliding_attention", "gated_delta_net")}, "expected full_attention and others"),
        ({"mixers": ("full_attention", "swa", "sliding_attention")}, "each once"),
        ({"mixers": ("full_attention", "mamba")}, "unknown mixer 'mamba'"),
        ({"window": 0}, "window is 0; expected at least one token"),
    ],
)
def test_wrong_options_are_refused(
    options: dict[str, Any], said: str, make_teacher: MakeTeacher, tmp_path: Path
):
    with pytest.raises(GearshiftError, match=said):
        convert_teacher(make_teacher(), tmp_path / "out", **options)
    assert [path.name for path in tmp_path.iterdir()] == ["teacher"]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"drop": "hidden_size"}, "config.json has no 'hidden_size'"),
        ({"drop": "num_attention_heads"}, "config.json has no 'num_attention_heads'"),
        ({"model_type": "rwkv"}, "'rwkv'; supported: llama.*one file in gearshift/convert/teachers"),
        ({"drop": "model_type"}, "model_type None; supported: llama"),
        ({"attention_bias": True}, "lacks 8 tensors .* such as model.layers.0.self_attn.q_proj.bias"),
        ({"num_hidden_layers": 1}, "has 9 tensors that no model with its config.json has, .* model.layers.1"),
        (
            {"quantization_config": {"bits": 4}},
            "has a 'quantization_config'; .* dequantise the teacher first",
        ),
        ({"num_key_value_heads": 3}, "4 query heads and 3 key/value heads"),
        ({"num_key_value_heads": 0}, "4 query heads and 0 key/value heads"),
        ({"num_attention_heads": 3}, "hidden size .32. is not a multiple"),
        ({"hidden_size": "32"}, "Field 'hidden_size' expected int, got str"),
        ({"num_hidden_layers": 3}, "lacks 9 tensors .* such as model.layers.2.input_layernorm.weight"),
        ({"num_key_value_heads": 4}, r"k_proj.weight has shape \(16, 32\); expected \(32, 32\)"),
        ({"vocab_size": 62}, r"embed_tokens.weight has shape \(61, 32\); expected \(62, 32\)"),
        ({"hidden_act": "gelou"}, "config.json has hidden_act 'gelou'; expected a name that Transformers"),
        ({"pad_token_id": 61}, "config.json does not make a supernet: pad_token_id is 61; expected a token"),
        ({"max_position_embeddings": -1}, "config.json does not make a supernet: max_position_embeddings"),
        ({"rope_parameters": {"rope_type": "llama3", "rope_theta": 1e4}}, "Missing required keys"),
    ],
)
def test_a_config_that_does_not_fit_is_refused(
    change: dict[str, Any], said: str, make_teacher: MakeTeacher, tmp_path: Path
):
    teacher = make_teacher()
    edit_config(teacher, **change)
    with pytest.raises(GearshiftError, match=said):
        convert_teacher(teacher, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["teacher"]


def test_a_missing_tensor_is_named(make_teacher: MakeTeacher, tmp_path: Path):
    teacher = make_teacher()
    tensors = all_tensors(teacher)
    del tensors["model.layers.1.self_attn.v_proj.weight"]
    save_file(tensors, teacher / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ConversionError, match=r"lacks 1 tensors .*model.layers.1.self_attn.v_proj.weight"):
        convert_teacher(teacher, tmp_path / "out")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda t: t[:, :-1].contiguous(), r"has shape \(16, 31\); expected \(16, 32\) from config.json"),
        (lambda t: t.to(torch.int8), "has dtype I8; expected F64 or F32"),
        (lambda t: t.where(t < 0, torch.nan), "holds infinities or what is not a number"),
    ],
    ids=["shape", "dtype", "NaN"],
)
def test_a_wrong_tensor_is_named_with_its_shard(
    change: Callable[[Tensor], Tensor], said: str, make_teacher: MakeTeacher, tmp_path: Path
):
    teacher, name = make_teacher(**TEACHERS["sharded"]), "model.layers.1.self_attn.k_proj.weight"
    index = json.loads((teacher / "model.safetensors.index.json").read_text())["weight_map"]
    shard = teacher / index[name]
    tensors = load_file(shard)
    tensors[name] = change(tensors[name])
    save_file(tensors, shard, metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=f"{shard.name}: {name} {said}"):
        convert_teacher(teacher, tmp_path / "out")


def test_other_things_in_the_place_of_weights_are_told_apart(make_teacher: MakeTeacher, tmp_path: Path):
    teacher = make_teacher()
    weights = teacher / "model.safetensors"
    weights.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n")
    with pytest.raises(CheckpointError, match="Git LFS's pointer to the file: git lfs pull gets it"):
        convert_teacher(teacher, tmp_path / "out")
    weights.unlink()
    with pytest.raises(CheckpointError, match="model.safetensors is missing; restore it"):
        convert_teacher(teacher, tmp_path / "out")
    (teacher / "pytorch_model.bin").touch()
    with pytest.raises(CheckpointError, match="has its weights in pytorch_model.bin, a pickle, which"):
        convert_teacher(teacher, tmp_path / "out")
    (teacher / "model-00001-of-00002.safetensors").touch()
    with pytest.raises(CheckpointError, match="index.json is missing, which says what is in model-00001-of"):
        convert_teacher(teacher, tmp_path / "out")


def test_a_teacher_that_is_not_there_or_damaged(make_teacher: MakeTeacher, tmp_path: Path):
    with pytest.raises(CheckpointError, match="nowhere: there is no config.json"):
        convert_teacher(tmp_path / "nowhere", tmp_path / "out")
    teacher = make_teacher()
    (teacher / "config.json").write_text("[1]")
    with pytest.raises(CheckpointError, match="config.json holds no JSON object"):
        convert_teacher(teacher, tmp_path / "out")
    (teacher / "config.json").write_text("{")
    with pytest.raises(CheckpointError, match="config.json is not valid JSON"):
        convert_teacher(teacher, tmp_path / "out")


def test_an_output_that_exists_is_left_alone(make_teacher: MakeTeacher, tmp_path: Path):
    teacher, out = make_teacher(), tmp_path / "out"
    out.write_text("a file")
    with pytest.raises(OutputExistsError, match="out already exists"):
        convert_teacher(teacher, out)
    assert out.read_text() == "a file"
    out.unlink()
    out.mkdir()  # an empty folder is no obstacle
    convert_teacher(teacher, out)
    with pytest.raises(OutputExistsError):
        convert_teacher(teacher, out)


def test_a_failed_overwrite_keeps_the_old(
    make_teacher: MakeTeacher, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    teacher, out = make_teacher(), tmp_path / "out"
    before = all_tensors(convert_teacher(teacher, out, seed=1))

    def interrupted(*arguments: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(convert_module, "seeded_generator", interrupted)
        with pytest.raises(KeyboardInterrupt):
            convert_teacher(teacher, out, seed=2, overwrite=True)
    assert all(torch.equal(tensor, before[name]) for name, tensor in all_tensors(out).items())
    assert {path.name for path in tmp_path.iterdir()} == {"teacher", "out"}
    (out / "stale.json").touch()
    convert_teacher(teacher, out, seed=2, overwrite=True)
    assert not (out / "stale.json").exists()


@pytest.mark.parametrize("out", ["teacher", "."])
def test_a_teacher_is_never_overwritten(out: str, make_teacher: MakeTeacher, tmp_path: Path):
    teacher = make_teacher()
    with pytest.raises(ConversionError, match="would replace the teacher"):
        convert_teacher(teacher, tmp_path / out, overwrite=True)
    LlamaForCausalLM.from_pretrained(teacher)


def test_names_of_families():
    assert supported_architectures() == ("llama", "mistral", "ministral", "qwen2", "qwen3", "llava")


def test_a_teacher_in_a_hubs_cache_is_read(make_teacher: MakeTeacher, tmp_path: Path):
    teacher = make_teacher()
    snapshot, blobs = tmp_path / "models--a--b" / "snapshots" / "c0ffee", tmp_path / "models--a--b" / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for number, path in enumerate(teacher.iterdir()):
        (snapshot / path.name).symlink_to(f"../../blobs/{number}")
        shutil.move(path, blobs / str(number))
    out = convert_teacher(snapshot, tmp_path / "out")
    assert not any(path.is_symlink() for path in out.iterdir())
    load_supernet(out)


def test_a_super_apriel_checkpoint_is_read_too(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    fixture = Path(__file__).parent / "apriel2" / "fixture"
    out = convert_teacher(fixture, tmp_path / "out", mixers=("fa", "kda"))
    assert load_supernet(out).placement_space.mixers == ("full_attention", "kimi_delta_attention")
    assert (out / "teacher_config.json").read_bytes() == (fixture / "config.json").read_bytes()
    assert not caplog.records


@pytest.mark.parametrize(
    ("options", "said"), [({"window": 3}, "window 3"), ({"init": "modulo"}, "init 'modulo'")]
)
def test_nothing_of_super_apriel_is_made_anew(options: dict[str, Any], said: str, tmp_path: Path):
    fixture = Path(__file__).parent / "apriel2" / "fixture"
    with pytest.raises(ConversionError, match=f"{said} has no meaning for them"):
        convert_teacher(fixture, tmp_path / "out", **options)
    assert not list(tmp_path.iterdir())

"""Export: a placement comes out in the plainest form that computes what the supernet computes."""

from __future__ import annotations

import errno
import json
import shutil
from collections.abc import Callable
from io import BufferedIOBase
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    LlamaForCausalLM,
    LlavaConfig,
    LlavaForConditionalGeneration,
    MinistralForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PixtralVisionConfig,
    PreTrainedModel,
    Qwen2ForCausalLM,
    Qwen3ForCausalLM,
)

from gearshift.convert import ConversionError, convert_teacher
from gearshift.convert.export import export_placement
from gearshift.convert.source import ExportError
from gearshift.errors import CheckpointError, OutputExistsError
from gearshift.placement import Placement, PlacementError
from gearshift.presets import Preset, read_presets, write_presets
from gearshift.supernet import SupernetConfig, SupernetForCausalLM, load_supernet, save_supernet
from gearshift.supernet.tensor_files import TensorFiles
from tests.convert.teachers.test_llava import VISION, names_in_memory
from tests.convert.teachers.test_qwen2 import FROM_LAYER_1, MIXED
from tests.convert.tiny_teachers import (
    SIZES,
    Variant,
    all_tensors,
    edit_config,
    random_tokens,
    same_tensors,
    save_teacher,
)

Make = Callable[..., Path]
WINDOW = 6
CLASSES: dict[str, type[PreTrainedModel]] = {
    "llama": LlamaForCausalLM,
    "mistral": MistralForCausalLM,
    "ministral": MinistralForCausalLM,
    "qwen2": Qwen2ForCausalLM,
    "qwen3": Qwen3ForCausalLM,
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 1e4,
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
YARN = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}
OLD_YARN = {"rope_parameters": None, "rope_theta": 1e5, "rope_scaling": YARN}


@pytest.fixture
def make(tmp_path: Path) -> Make:
    """Call it with a family and fields of its config: the supernet of a tiny teacher with a short window."""

    def make(family: str, variant: Variant | None = None, /, window: int = WINDOW, **fields: Any) -> Path:
        teacher = tmp_path / "teacher"
        model_class, variant = CLASSES[family], variant or Variant()
        assert model_class.config_class is not None
        wide = {"head_dim": 8} if family in ("ministral", "qwen3") else {}
        sizes: dict[str, Any] = SIZES | wide | fields
        config = model_class.config_class(**sizes)
        save_teacher(model_class, config, variant, teacher)
        return convert_teacher(teacher, tmp_path / "supernet", window=window)

    return make


@torch.no_grad()
def largest_difference(exported: Path, supernet: Path, placement: str) -> float:
    """Between the logits of Transformers' own class and the supernet's, over texts longer than the window."""
    own = AutoModelForCausalLM.from_pretrained(exported, dtype=torch.float32).eval()
    assert "gearshift" not in type(own).__module__
    expected = load_supernet(supernet)(random_tokens(), placement=placement).logits
    assert expected.std() > 0.01
    return (own(random_tokens()).logits - expected).abs().max().item()


@pytest.mark.parametrize(
    ("family", "variant", "fields", "placement", "name"),
    [
        ("qwen2", {}, {}, "fa swa", "Qwen2ForCausalLM"),
        ("qwen2", {}, {}, "swa*2", "Qwen2ForCausalLM"),
        ("qwen2", OLD_YARN, {"tie_word_embeddings": True}, "swa fa", "Qwen2ForCausalLM"),
        (
            "qwen2",
            {"layer_types": None},
            FROM_LAYER_1 | {"sliding_window": WINDOW},
            "swa fa",
            "Qwen2ForCausalLM",
        ),
        ("qwen3", {}, {}, "fa swa", "Qwen3ForCausalLM"),
        ("qwen3", {}, {"attention_bias": True, "rope_parameters": LLAMA3}, "swa fa", "Qwen3ForCausalLM"),
        ("qwen3", {}, MIXED | {"sliding_window": WINDOW}, "fa swa fa", "Qwen3ForCausalLM"),
        ("llama", {}, {}, "fa swa", "MinistralForCausalLM"),
        (
            "llama",
            {},
            {"rope_parameters": LLAMA3, "tie_word_embeddings": True},
            "swa fa",
            "MinistralForCausalLM",
        ),
        ("llama", OLD_YARN, {"head_dim": 16}, "fa swa", "MinistralForCausalLM"),
        ("llama", {}, {}, "swa*2", "MistralForCausalLM"),
        ("mistral", OLD_YARN, {"sliding_window": None}, "swa fa", "MinistralForCausalLM"),
        ("mistral", {}, {"sliding_window": None}, "swa*2", "MistralForCausalLM"),
        ("mistral", {}, {"sliding_window": WINDOW}, "fa swa", "MistralForCausalLM"),
        ("ministral", {}, MIXED | {"sliding_window": WINDOW}, "swa*3", "MistralForCausalLM"),
        ("ministral", {}, MIXED | {"sliding_window": WINDOW}, "swa fa swa", "MinistralForCausalLM"),
    ],
)
def test_full_and_sliding_attention_leave_as_a_class_with_windows(
    family: str,
    variant: dict[str, Any],
    fields: dict[str, Any],
    placement: str,
    name: str,
    make: Make,
    tmp_path: Path,
):
    supernet = make(family, Variant(config_json=variant), **fields)
    _differ_between_mixers(supernet)
    export = export_placement(supernet, tmp_path / "out", placement)
    assert export.form is not None
    assert export.form.class_name == name
    assert largest_difference(tmp_path / "out", supernet, placement) < 1e-5


def test_programs_that_read_older_fields_are_not_misled(make: Make, tmp_path: Path):
    supernet = make("qwen2", num_hidden_layers=4)
    for placement, first in (("fa*2 swa*2", 2), ("swa fa swa fa", 0), ("fa*3 swa", 3)):
        export_placement(supernet, tmp_path / "out", placement, overwrite=True)
        config = json.loads((tmp_path / "out" / "config.json").read_text())
        assert (config["use_sliding_window"], config["sliding_window"]) == (True, WINDOW)
        assert config["max_window_layers"] == first


def _differ_between_mixers(supernet: Path) -> None:
    """As training does: sliding attention no longer has the weights of full attention."""
    tensors = load_file(supernet / "model.safetensors")
    for name, tensor in tensors.items():
        if "sliding_attention" in name:
            tensor.mul_(1.25)
    save_file(tensors, supernet / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize(
    ("family", "fields", "placement", "why"),
    [
        ("llama", {}, "fa gdn", "layer 1 is gdn"),
        ("qwen2", {}, "kda swa", "layer 0 is kda"),
        ("llama", {"attention_bias": True}, "fa swa", "no class like llama fits: window of layer 1 is 6"),
        ("llama", {"mlp_bias": True}, "swa*2", "no class like llama fits: window of layer 0 is 6"),
        ("mistral", {"sliding_window": 20}, "fa swa", "its layers have windows of 6, 20 tokens"),
        ("qwen2", MIXED, "fa swa swa", "its layers have windows of 6, 8 tokens"),
    ],
)
@torch.no_grad()
def test_everything_else_leaves_as_a_supernet(
    family: str, fields: dict[str, Any], placement: str, why: str, make: Make, tmp_path: Path
):
    supernet = make(family, **fields)
    export = export_placement(supernet, tmp_path / "out", placement)
    assert export.form is None
    assert export.why_supernet.startswith(why)
    whole, thin = load_supernet(supernet), load_supernet(tmp_path / "out")
    assert thin.placement == Placement.parse(placement)
    assert thin.placement_space.size == 1
    expected = whole(random_tokens(), placement=placement).logits
    assert torch.equal(thin(random_tokens()).logits, expected)


@torch.no_grad()
def test_decoding_with_a_cache_goes_on_alike(make: Make, tmp_path: Path):
    supernet = make("qwen2")
    export_placement(supernet, tmp_path / "out", "fa swa")
    own, whole = AutoModelForCausalLM.from_pretrained(tmp_path / "out"), load_supernet(supernet)
    whole.set_placement("fa swa")
    options = {"max_new_tokens": 3 * WINDOW, "do_sample": False, "pad_token_id": 0}
    given = own.generate(random_tokens(10), **options)  # pyright: ignore[reportAttributeAccessIssue]
    expected = whole.generate(random_tokens(10), **options)  # pyright: ignore[reportAttributeAccessIssue]
    assert torch.equal(given, expected)


@pytest.mark.parametrize("family", CLASSES)
@pytest.mark.parametrize(
    "variant",
    [Variant(), Variant(dtype=torch.bfloat16, max_shard_size="20KB")],
    ids=["plain", "bfloat16, sharded"],
)
def test_the_teacher_leaves_as_it_came_and_can_come_again(
    family: str, variant: Variant, make: Make, tmp_path: Path
):
    supernet, teacher, out = make(family, variant), tmp_path / "teacher", tmp_path / "out"
    export = export_placement(supernet, out, "fa*2")
    assert export.form is not None and export.form.is_teacher
    assert (out / "config.json").read_bytes() == (teacher / "config.json").read_bytes()
    assert same_tensors(out, teacher)
    assert export.nbytes == sum(tensor.nbytes for tensor in all_tensors(teacher).values())
    again = convert_teacher(out, tmp_path / "again", window=WINDOW)
    assert same_tensors(again, supernet)
    assert (again / "config.json").read_bytes() == (supernet / "config.json").read_bytes()


def test_presets_and_what_is_only_a_supernets_stay_behind(make: Make, tmp_path: Path):
    supernet = make("llama")
    write_presets(supernet, [Preset("fast", Placement.parse("gdn*2"))])
    (supernet / "tokenizer.json").write_text("{}")
    export_placement(supernet, tmp_path / "out", "fa*2")
    companions = {path.name for path in (tmp_path / "out").iterdir()}
    assert companions == {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json"}


@pytest.mark.parametrize(
    ("family", "fields", "name"),
    [
        ("llama", {"tie_word_embeddings": True, "rope_parameters": LLAMA3}, "LlamaForCausalLM"),
        ("llama", {"mlp_bias": True, "attention_bias": True, "head_dim": 16}, "LlamaForCausalLM"),
        ("mistral", {"sliding_window": None}, "LlamaForCausalLM"),
        ("mistral", {"sliding_window": 8}, "MistralForCausalLM"),
        ("ministral", MIXED, "MinistralForCausalLM"),
        ("qwen2", {}, "Qwen2ForCausalLM"),
        ("qwen2", MIXED, "Qwen2ForCausalLM"),
        ("qwen3", {"attention_bias": True}, "Qwen3ForCausalLM"),
    ],
)
def test_an_older_supernet_without_its_teachers_config(
    family: str, fields: dict[str, Any], name: str, make: Make, tmp_path: Path
):
    supernet, placement = make(family, **fields), f"fa*{fields.get('num_hidden_layers', 2)}"
    (supernet / "teacher_config.json").unlink()
    export = export_placement(supernet, tmp_path / "out", placement)
    assert export.form is not None
    assert (export.form.class_name, export.form.is_teacher) == (name, False)
    assert same_tensors(tmp_path / "out", tmp_path / "teacher")
    assert largest_difference(tmp_path / "out", supernet, placement) < 1e-5
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == "float32"


def test_a_teacher_of_no_known_class_is_refused(make: Make, tmp_path: Path):
    supernet = make("llama", attention_bias=True)
    (supernet / "teacher_config.json").unlink()
    model = load_supernet(supernet)
    mixers = model.config.mixers
    assert mixers is not None
    for name in ("full_attention", "sliding_attention"):
        mixers[name]["biases"] = ["q_proj"]
    save_supernet(SupernetForCausalLM(SupernetConfig.from_dict(model.config.to_dict())), tmp_path / "odd")
    with pytest.raises(
        ExportError,
        match=r"computes 'fa\*2': no class like llama fits: biases of layer 0 is .* gearshift thin",
    ):
        export_placement(tmp_path / "odd", tmp_path / "out", "fa*2")
    assert not (tmp_path / "out").exists()
    assert export_placement(tmp_path / "odd", tmp_path / "out", "fa swa").form is None


@pytest.mark.parametrize(
    ("changes", "error", "said"),
    [
        ({"rms_norm_eps": 0.5}, ExportError, "rms_norm_eps is 1e-06, where such a class has 0.5"),
        ({"intermediate_size": 48}, ExportError, "intermediate_size of layer 0 is 40, .* 48"),
        ({"num_key_value_heads": 1}, ExportError, "num_key_value_heads of layer 0 is 2, .* 1"),
        ({"hidden_size": None}, ConversionError, "teacher_config.json has no 'hidden_size'"),
    ],
)
def test_the_config_of_another_teacher_is_refused(
    changes: dict[str, Any], error: type[Exception], said: str, make: Make, tmp_path: Path
):
    supernet = make("llama")
    (supernet / "config.json").rename(supernet / "supernet.json")
    (supernet / "teacher_config.json").rename(supernet / "config.json")
    edit_config(supernet, changes)
    (supernet / "config.json").rename(supernet / "teacher_config.json")
    (supernet / "supernet.json").rename(supernet / "config.json")
    with pytest.raises(error, match=said):
        export_placement(supernet, tmp_path / "out", "fa*2")
    assert not (tmp_path / "out").exists()


@pytest.fixture
def make_llava(tmp_path: Path) -> Make:
    """Call it to get the supernet of a tiny llava."""

    def make(variant: Variant | None = None, /, extra: bool = True) -> Path:
        fields: dict[str, Any] = SIZES | {"sliding_window": None}
        text = MistralConfig(**fields)
        config = LlavaConfig(
            text_config=text, vision_config=PixtralVisionConfig(**VISION), image_token_index=60
        )
        save_teacher(LlavaForConditionalGeneration, config, variant or Variant(), tmp_path / "teacher")
        return convert_teacher(tmp_path / "teacher", tmp_path / "supernet", window=WINDOW, extra=extra)

    return make


@pytest.mark.parametrize("variant", [Variant(), Variant(tensors=names_in_memory)], ids=["saved", "in memory"])
def test_a_vision_tower_that_was_kept_leaves_with_the_text(
    variant: Variant, make_llava: Make, tmp_path: Path
):
    export = export_placement(make_llava(variant), tmp_path / "out", "fa*2")
    assert export.form is not None
    assert (export.form.class_name, export.is_part) == ("LlavaForConditionalGeneration", False)
    assert same_tensors(tmp_path / "out", tmp_path / "teacher")
    assert not (tmp_path / "out" / "teacher_extra").exists()
    LlavaForConditionalGeneration.from_pretrained(tmp_path / "out")


@pytest.mark.parametrize(
    ("extra", "placement", "name"),
    [
        (False, "fa*2", "MistralForCausalLM"),
        (True, "fa swa", "MinistralForCausalLM"),
        (True, "swa*2", "MistralForCausalLM"),
    ],
)
def test_the_text_of_a_llava_leaves_alone(
    extra: bool, placement: str, name: str, make_llava: Make, tmp_path: Path
):
    supernet = make_llava(extra=extra)
    export = export_placement(supernet, tmp_path / "out", placement)
    assert export.form is not None
    assert (export.form.class_name, export.is_part) == (name, True)
    assert largest_difference(tmp_path / "out", supernet, placement) < 1e-5


def test_another_placement_keeps_its_presets(make: Make, tmp_path: Path):
    supernet = make("llama")
    placements = {"teacher": "fa*2", "fast": "gdn kda", "too": "gdn kda"}
    write_presets(
        supernet, [Preset(name, Placement.parse(text), retention=0.5) for name, text in placements.items()]
    )
    export_placement(supernet, tmp_path / "fast", "gdn kda")
    assert [(p.name, p.retention) for p in read_presets(tmp_path / "fast").values()] == [
        ("fast", 0.5),
        ("too", 0.5),
    ]
    export_placement(supernet, tmp_path / "other", "kda gdn")
    assert not (tmp_path / "other" / "presets.json").exists()
    with pytest.raises(PlacementError, match="has fa in layer 0; this model holds only gdn, kda"):
        export_placement(tmp_path / "fast", tmp_path / "out", "fa*2")
    assert same_tensors(
        export_placement(tmp_path / "fast", tmp_path / "again", "gdn kda").path, tmp_path / "fast"
    )


def test_an_output_that_is_there_is_kept_unless_told(make: Make, tmp_path: Path):
    supernet, out = make("llama"), tmp_path / "out"
    out.mkdir()
    (out / "thesis.txt").write_text("do not lose me")
    with pytest.raises(OutputExistsError, match="out already exists"):
        export_placement(supernet, out, "fa*2")
    export_placement(supernet, out, "fa*2", overwrite=True)
    assert not (out / "thesis.txt").exists()
    for place in (supernet, tmp_path):
        with pytest.raises(ExportError, match="would replace the supernet"):
            export_placement(supernet, place, "fa*2", overwrite=True)
    load_supernet(supernet)


@pytest.mark.parametrize("placement", ["fa*2", "fa swa", "gdn*2"])
def test_weights_that_are_not_whole_are_refused(placement: str, make: Make, tmp_path: Path):
    supernet = make("qwen2")
    tensors = load_file(supernet / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, supernet / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match="lacks 1 tensors"):
        export_placement(supernet, tmp_path / "out", placement)
    (supernet / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match="model.safetensors is missing"):
        export_placement(supernet, tmp_path / "out", placement)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("placement", ["fa*2", "fa swa", "gdn*2"])
def test_a_full_disk_leaves_nothing(
    placement: str, make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    supernet = make("qwen2")
    before, written = set(tmp_path.iterdir()), []

    def copy_to(self: TensorFiles, name: str, target: BufferedIOBase) -> None:
        written.append(name)
        if len(written) > 5:
            raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(TensorFiles, "copy_to", copy_to)
    with pytest.raises(CheckpointError, match="no space left on the disk"):
        export_placement(supernet, tmp_path / "out", placement)
    assert len(written) > 5
    assert set(tmp_path.iterdir()) == before


def test_a_teachers_config_that_is_a_link_out_of_the_directory_is_refused(make: Make, tmp_path: Path):
    supernet = make("llama")
    shutil.move(supernet / "teacher_config.json", tmp_path / "secret.json")
    (supernet / "teacher_config.json").symlink_to(tmp_path / "secret.json")
    with pytest.raises(CheckpointError, match="outside the directory"):
        export_placement(supernet, tmp_path / "out", "fa*2")

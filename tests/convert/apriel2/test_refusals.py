"""What cannot be converted is named, with the place where it stands, and nothing is written."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from gearshift.convert import ConversionError, convert_teacher
from gearshift.errors import GearshiftError
from tests.convert.apriel2.checkpoints import (
    ALL,
    ATTENTION,
    GDN,
    KDA,
    SUPERNET,
    WINDOW,
    Config,
    block,
    fixed,
    pattern,
    random_tensors,
    save,
    stochastic,
)

GONE = object()
BLOCK = "decoder.block."
MIXERS = f"{BLOCK}mixer.mixers."
SCALED = {"theta": 1e4, "scale_factor": 8.0, "original_context_length": 64}
BANDS = {"low_frequency_factor": 1.0, "high_frequency_factor": 4.0}


def changed(config: Config, place: str, value: object) -> Config:
    """The config with another value at a place such as ``decoder.num_blocks``."""
    config = copy.deepcopy(config)
    *outer, key = place.split(".")
    inner: Any = config
    for name in outer:
        inner = inner[name]
    if value is GONE:
        del inner[key]
    else:
        inner[key] = value
    return config


def refused(directory: Path, config: Config, tensors: dict[str, Tensor], said: str, **options: Any) -> None:
    """Converting raises an error of the user's that matches, and leaves nothing."""
    save(directory / "in", config, tensors)
    with pytest.raises(GearshiftError, match=said):
        convert_teacher(directory / "in", directory / "out", **options)
    assert [path.name for path in directory.iterdir()] == ["in"]


VALUES: list[tuple[str, object, str]] = [
    ("decoder", GONE, "has no 'decoder'"),
    ("decoder", [], r"config.json.decoder is \[\]; expected an object"),
    ("decoder.num_blocks", GONE, "config.json.decoder has no 'num_blocks'"),
    ("decoder.num_blocks", 0, "num_blocks is 0; expected a positive whole number"),
    ("decoder.num_blocks", 10**12, "num_blocks is 1000000000000; the checkpoint has only"),
    ("decoder.type", "spiral", "type is 'spiral'; expected 'fixed' or 'pattern'"),
    ("decoder.type", "pattern", "config.json.decoder has no 'pattern'"),
    ("decoder.block", GONE, "config.json.decoder has no 'block'"),
    (f"{BLOCK}mixer", GONE, "decoder.block has no 'mixer'"),
    (f"{BLOCK}mixer.type", GONE, "decoder.block.mixer has no 'type'"),
    (f"{BLOCK}mixer.mixers", {}, "mixers is {}; expected at least one"),
    (f"{BLOCK}mixer.main_mixer_name", "fa", "main_mixer_name is 'fa'; expected 'attention' or 'gdn' or"),
    (f"{MIXERS}gdn.type", "mamba", "mixers.gdn: type is 'mamba'; of the mixers that the format has"),
    (f"{MIXERS}gdn.type", "stochastic", "mixers.gdn: type is 'stochastic'"),
    (f"{MIXERS}gdn.type", ["gdn"], "mixers.gdn: type is"),
    (f"{MIXERS}twin", ATTENTION, "attention and twin are both full_attention; .* one mixer of a kind"),
    (f"{MIXERS}twin", {**WINDOW, "window_size": 9}, "sliding_window and twin are both sliding_attention"),
    (f"{MIXERS}attention.heads", GONE, "mixers.attention has no 'heads'"),
    (f"{MIXERS}attention.heads", "4", "heads is '4'; expected a positive whole number"),
    (f"{MIXERS}attention.head_groups", 3, "mixers.attention: head_groups 3 does not divide the 4 heads"),
    (f"{MIXERS}attention.head_size", 7, "head_size is 7; expected an even number"),
    (f"{MIXERS}attention.causal", False, "causal is False; a text's tokens see no later ones"),
    (f"{MIXERS}attention.window_size", 0, "window_size is 0; expected a positive whole number"),
    (f"{MIXERS}attention.add_linear_biases", "no", "add_linear_biases is 'no'; expected true or false"),
    (f"{MIXERS}attention.query_layer", {"bias": True}, "query_layer.bias is True; expected an object"),
    (f"{MIXERS}attention.rotary", GONE, "mixers.attention has no 'rotary'"),
    (f"{MIXERS}attention.rotary.theta", GONE, "rotary has no 'theta'"),
    (f"{MIXERS}attention.rotary.theta", -1, "theta is -1; expected a positive number"),
    (
        f"{MIXERS}attention.rotary.type",
        "pixtral_2d",
        "type is 'pixtral_2d'; expected 'mistral_1d' or 'llama3'",
    ),
    (f"{MIXERS}attention.rotary", {"type": "llama3", "theta": 1e4}, "rotary has no 'scale_factor'"),
    (f"{MIXERS}attention.rotary", {"type": "llama3", **SCALED}, "rotary has no 'low_frequency_factor'"),
    (
        f"{MIXERS}attention.rotary",
        {"type": "llama3", **SCALED, **BANDS, "high_frequency_factor": 1.0},
        "high_frequency_factor is 1.0; expected more than low_frequency_factor",
    ),
    (
        f"{MIXERS}attention.rotary",
        {"type": "yarn", **SCALED, **BANDS},
        "low_frequency_factor is 1.0; a rotary",
    ),
    (f"{MIXERS}gdn.key_heads", 3, "mixers.gdn: key_heads 3 does not divide the 4 heads"),
    (f"{MIXERS}gdn.convolution_layer", GONE, "mixers.gdn has no 'convolution_layer'"),
    (f"{MIXERS}gdn.convolution_layer.kernel_size", GONE, "convolution_layer has no 'kernel_size'"),
    (f"{MIXERS}gdn.convolution_layer.activation", "relu", "activation is 'relu'; expected 'silu'"),
    (f"{MIXERS}gdn.norm_eps", 0, "norm_eps is 0; expected a positive number"),
    (f"{MIXERS}kda.normalization.activation", "tanh", "activation is 'tanh'; expected 'silu' or 'sigmoid'"),
    (f"{MIXERS}kda.normalization.epsilon", float("nan"), "epsilon is nan; expected a positive number"),
    (f"{BLOCK}mlp", GONE, "decoder.block has no 'mlp'"),
    (f"{BLOCK}mlp.type", "moe", "mlp: type is 'moe'; expected 'mlp'"),
    (f"{BLOCK}mlp.intermediate_size", GONE, "mlp has no 'intermediate_size'"),
    (f"{BLOCK}mlp.activation", "squared_relu", "activation is 'squared_relu'; expected a name that"),
    (f"{BLOCK}mlp.gated", 1, "gated is 1; expected true or false"),
    (f"{BLOCK}normalization.type", "layer_norm", "normalization: type is 'layer_norm'; expected 'rms_norm'"),
    (
        "head.normalization.type",
        "layer_norm",
        "head.normalization: type is 'layer_norm'; expected 'rms_norm'",
    ),
    (
        f"{BLOCK}normalization.epsilon",
        1e-6,
        "normalization.epsilon is 1e-06 and head.normalization.epsilon 1e-05",
    ),
    ("head.normalization.epsilon", 1e-6, "is 1e-05 and head.normalization.epsilon 1e-06"),
    ("tie_word_embeddings", "yes", "tie_word_embeddings is 'yes'; expected true or false"),
    ("vocab_size", -1, "vocab_size is -1; expected a positive whole number"),
    ("eos_token_id", "</s>", "eos_token_id '</s>'; expected a whole number"),
]


@pytest.mark.parametrize(("place", "value", "said"), VALUES)
def test_a_value_that_cannot_be(place: str, value: object, said: str, tmp_path: Path):
    refused(tmp_path, changed(SUPERNET, place, value), random_tensors(SUPERNET), said)


PATTERNS: list[tuple[dict[str, Any], str]] = [
    ({"pattern": []}, r"pattern is \[\]; expected a list of the names of blocks"),
    ({"pattern": "a"}, "pattern is 'a'; expected a list of the names of blocks"),
    ({"pattern": ["a", "c"]}, "decoder.blocks has no 'c'"),
    ({"blocks": None}, "decoder has no 'blocks'"),
]


@pytest.mark.parametrize(("change", "said"), PATTERNS)
def test_a_pattern_that_cannot_be(change: dict[str, Any], said: str, tmp_path: Path):
    config = pattern({"a": block(GDN), "b": block(KDA)}, ["a", "b"])
    tensors = random_tensors(config)
    refused(tmp_path, {**config, "decoder": config["decoder"] | change}, tensors, said)


def test_one_block_of_a_pattern_with_another_epsilon(tmp_path: Path):
    config = pattern({"a": block(GDN), "b": block(KDA, epsilon=1e-6)}, ["a", "b"])
    refused(tmp_path, config, random_tensors(config), "blocks.b.normalization.epsilon is 1e-06 and head")


def test_an_absent_head_has_an_epsilon_too(tmp_path: Path):
    config = pattern({"a": block(GDN, epsilon=1e-6)}, ["a"], head=None)
    refused(tmp_path, config, random_tensors(config), "is 1e-06 and head.normalization.epsilon 1e-05")


Q_BIAS = "model.decoder.blocks.1.mixer.mixers.attention.q_proj.bias"
GATE = "model.decoder.blocks.0.mlp.gate_proj.weight"


def test_missing_and_surplus_tensors_are_listed(tmp_path: Path):
    tensors = random_tensors(SUPERNET)
    for name in (GATE, "model.decoder.blocks.2.mixer.mixers.gdn.A_log"):
        del tensors[name]
    tensors["model.decoder.blocks.3.input_layernorm.weight"] = torch.ones(24)
    tensors["model.rotary_emb.inv_freq"] = torch.ones(4)
    lacks = "lacks 2 tensors .model.decoder.blocks.0.mlp.gate_proj.weight, .*blocks.2.mixer.mixers.gdn.A_log"
    surplus = "has surplus 2 tensors .*blocks.3.input_layernorm.weight, model.rotary_emb.inv_freq"
    refused(tmp_path, SUPERNET, tensors, f"{lacks}.* and {surplus}")


def test_of_very_many_only_some_are_listed(tmp_path: Path):
    refused(tmp_path, SUPERNET, {GATE: random_tensors(SUPERNET)[GATE]} | fill(), r"lacks \d+ .* and \d+ more")


def fill() -> dict[str, Tensor]:
    return {f"model.vision_encoder.{i}": torch.ones(1) for i in range(5)}


BIASES: dict[str, tuple[dict[str, Any], Callable[[dict[str, Tensor]], None], str]] = {
    "said but not stored": ({"add_linear_biases": True}, lambda tensors: None, "lacks 12 tensors"),
    "stored but denied": (
        {"add_linear_biases": False},
        lambda tensors: tensors.update({Q_BIAS: torch.ones(32)}),
        f"has surplus 1 tensors .{Q_BIAS}",
    ),
    "stored but denied for this projection": (
        {"add_linear_biases": True, "query_layer": {"bias": {"enabled": False}}},
        lambda tensors: tensors.update(
            {
                Q_BIAS.replace("1", str(layer)).replace("q_", f"{name}_"): torch.ones(size)
                for layer in range(3)
                for name, size in (("q", 32), ("k", 16), ("v", 16), ("o", 24))
            }
        ),
        "has surplus 3 tensors .*q_proj.bias",
    ),
}


@pytest.mark.parametrize(("fields", "change", "said"), BIASES.values(), ids=list(BIASES))
def test_biases_on_which_config_and_tensors_disagree(
    fields: dict[str, Any], change: Callable[[dict[str, Tensor]], None], said: str, tmp_path: Path
):
    tensors = random_tensors(SUPERNET)
    change(tensors)
    mixers = {**ALL, "attention": {**ATTENTION, **fields}}
    refused(tmp_path, fixed(stochastic(mixers)), tensors, said)


@pytest.mark.parametrize("name", ["mlp.up_proj.bias", "mixer.mixers.gdn.convolution.bias"])
def test_biases_that_the_format_does_not_have(name: str, tmp_path: Path):
    config = changed(SUPERNET, f"{BLOCK}mlp.add_linear_biases", True)
    surplus = {f"model.decoder.blocks.0.{name}": torch.ones(20)}
    refused(tmp_path, config, random_tensors(SUPERNET) | surplus, f"has surplus 1 tensors .*{name}")


TENSORS: dict[str, tuple[Callable[[Tensor], Tensor], str]] = {
    "shape": (lambda t: t[:, :-1].contiguous(), r"has shape \(20, 23\); expected \(20, 24\)"),
    "dtype": (lambda t: t.to(torch.int8), "has dtype I8; expected"),
    "NaN": (lambda t: t.where(t < 0, torch.nan), "holds infinities or what is not a number"),
}


@pytest.mark.parametrize(("change", "said"), TENSORS.values(), ids=list(TENSORS))
def test_a_tensor_that_cannot_be(change: Callable[[Tensor], Tensor], said: str, tmp_path: Path):
    tensors = random_tensors(SUPERNET)
    tensors[GATE] = change(tensors[GATE])
    refused(tmp_path, SUPERNET, tensors, f"{GATE} {said}")


def test_a_head_that_is_tied_in_the_config_alone(tmp_path: Path):
    refused(
        tmp_path,
        changed(SUPERNET, "tie_word_embeddings", False),
        random_tensors({**SUPERNET, "tie_word_embeddings": True}),
        "lacks 1 tensors .lm_head.weight",
    )


MIXERS_ASKED: list[tuple[list[str], str]] = [
    (["swa"], "layer 1 holds only gated_delta_net, and of the mixers only sliding_attention"),
    (
        ["fa", "gdn"],
        "holds no full_attention; expected some of gated_delta_net, kimi_delta_attention, sliding",
    ),
    (["mamba"], "unknown mixer 'mamba'"),
]


@pytest.mark.parametrize(("mixers", "said"), MIXERS_ASKED)
def test_mixers_that_are_not_there(mixers: list[str], said: str, tmp_path: Path):
    config = pattern({"a": block(stochastic({"w": WINDOW, "k": KDA})), "b": block(GDN)}, ["a", "b"])
    refused(tmp_path, config, random_tensors(config), said, mixers=mixers)


def test_its_errors_say_that_it_is_the_conversion(tmp_path: Path):
    save(tmp_path / "in", changed(SUPERNET, "decoder", GONE), random_tensors(SUPERNET))
    with pytest.raises(ConversionError):
        convert_teacher(tmp_path / "in", tmp_path / "out")

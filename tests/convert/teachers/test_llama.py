"""Llama: rotary embeddings of every type, biases, tied heads."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import LlamaForCausalLM
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from gearshift.convert import ConversionError
from gearshift.convert.teachers import FAMILIES, read_teacher
from tests.convert.teacher_contract import TeacherContract
from tests.convert.tiny_teachers import SIZES, Variant

LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
# Four frequencies a head, two lists of them; the text is longer than the original context.
LONGROPE = {
    "rope_type": "longrope",
    "short_factor": [1.0, 1.1, 1.2, 1.3],
    "long_factor": [1.0, 2.0, 3.0, 4.0],
    "original_max_position_embeddings": 16,
    "factor": 8.0,
}
ROPES: dict[str, dict[str, Any]] = {
    "default": {"rope_type": "default", "rope_theta": 500.0},
    "linear": {"rope_type": "linear", "factor": 2.0},
    "dynamic": {"rope_type": "dynamic", "factor": 2.0},
    "yarn": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32},
    "yarn, with mscale": {
        "rope_type": "yarn",
        "factor": 8.0,
        "original_max_position_embeddings": 16,
        "mscale": 1.0,
        "mscale_all_dim": 0.8,
        "beta_fast": 16.0,
    },
    "longrope": LONGROPE,
    "llama3": LLAMA3,
    "proportional": {"rope_type": "proportional", "rope_theta": 500.0, "partial_rotary_factor": 0.5},
}


def old_form(rope: dict[str, Any]) -> dict[str, Any]:
    """The same as configs had it before Transformers 5."""
    scaling = {key: value for key, value in rope.items() if key != "rope_theta"}
    return {"rope_parameters": None, "rope_theta": rope.get("rope_theta", 2000.0), "rope_scaling": scaling}


def with_stored_frequencies(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Conversions of the first Llamas stored what the config says anyway."""
    return tensors | {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}


def with_second_head(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return tensors | {"lm_head.weight": tensors["model.embed_tokens.weight"].clone()}


class TestLlama(TeacherContract):
    model_class = LlamaForCausalLM
    variants = {
        **{
            f"{name} rotary embeddings": Variant(
                {"rope_parameters": rope, "max_position_embeddings": 32 if name == "dynamic" else 128}
            )
            for name, rope in ROPES.items()
        },
        **{
            f"{name} rotary embeddings, old form": Variant(
                {"max_position_embeddings": 32 if name == "dynamic" else 128}, old_form(rope)
            )
            for name, rope in ROPES.items()
        },
        "rope type under its first name": Variant(
            config_json={"rope_parameters": None, "rope_scaling": {"type": "linear", "factor": 4.0}}
        ),
        "original context at the top level": Variant(
            config_json={
                **old_form({**LONGROPE, "original_max_position_embeddings": None}),
                "original_max_position_embeddings": 16,
            }
        ),
        "biases in attention": Variant({"attention_bias": True}),
        "biases everywhere": Variant({"attention_bias": True, "mlp_bias": True}),
        "biases in the FFN": Variant({"mlp_bias": True}),
        "tied head": Variant({"tie_word_embeddings": True}),
        "tied head, stored twice": Variant({"tie_word_embeddings": True}, tensors=with_second_head),
        "one key/value head": Variant({"num_key_value_heads": 1}),
        "no groups": Variant({"num_key_value_heads": 4}, {"num_key_value_heads": None}),
        "wide heads": Variant({"head_dim": 16}),
        "no head_dim": Variant(config_json={"head_dim": None}),
        "stored frequencies": Variant(tensors=with_stored_frequencies),
        "several ends of text": Variant({"eos_token_id": [2, 5]}),
        "another activation": Variant({"hidden_act": "gelu"}),
    }
    rich = {"attention_bias": True, "mlp_bias": True}
    broken = [
        ({"vocab_size": None}, "x/config.json has no 'vocab_size'"),
        ({"hidden_size": None}, "has no 'hidden_size'"),
        ({"intermediate_size": None}, "has no 'intermediate_size'"),
        ({"num_hidden_layers": None}, "has no 'num_hidden_layers'"),
        ({"num_attention_heads": None}, "has no 'num_attention_heads'"),
        ({"num_key_value_heads": 3}, "4 query heads and 3 key/value heads; expected the first"),
        ({"num_key_value_heads": 0}, "4 query heads and 0 key/value heads"),
        ({"num_key_value_heads": -2}, "4 query heads and -2 key/value heads"),
        ({"vocab_size": -1}, "x/config.json is refused: vocab_size is -1; expected at least 1: restore it"),
        ({"num_hidden_layers": 0}, "is refused: num_hidden_layers is 0; expected at least 1"),
        ({"num_attention_heads": 0}, "is refused: num_attention_heads is 0; expected at least 1"),
        ({"hidden_act": "gelou"}, "has hidden_act 'gelou'; expected a name that Transformers knows"),
        (
            {"num_attention_heads": 3, "num_key_value_heads": 3},
            "is not a multiple of the number of attention",
        ),
        ({"hidden_size": "32"}, "Field 'hidden_size' expected int, got str"),
        ({"head_dim": 7}, "refused: .*even rotary dimension"),
        ({"head_dim": 3}, "do not turn the 3 channels"),
        (
            {"rope_parameters": {"rope_type": "spiral"}},
            "rope type 'spiral'; expected one of default, linear, dynamic, yarn, longrope, llama3",
        ),
        ({"rope_parameters": {"rope_type": ["linear"]}}, "rope type .'linear'.; expected one of"),
        ({"rope_parameters": None, "rope_scaling": {"type": "su"}}, "rope type 'su'; expected one of"),
        ({"rope_parameters": None, "rope_scaling": "linear"}, "is refused"),
        ({"rope_parameters": {"rope_type": "llama3"}}, "Missing required keys"),
        ({"rope_parameters": {"rope_type": "linear", "factor": 0}}, "expected finite frequencies"),
        ({"rope_parameters": {**LONGROPE, "long_factor": [1.0, 2.0]}}, "rotary parameters .* are refused"),
        ({"rope_parameters": {**LONGROPE, "long_factor": None}}, "refused"),
        (
            {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "partial_rotary_factor": 0.5}},
            "do not turn the 8 channels of a head",
        ),
        ({"quantization_config": {"bits": 4}}, "has 'quantization_config', which conversion does not know"),
        ({"per_layer_config": {"0": {"num_key_value_heads": 1}}}, "has 'per_layer_config'"),
    ]


def test_every_rotary_embedding_that_transformers_knows_is_among_the_variants():
    assert {rope["rope_type"] for rope in ROPES.values()} == {"default", *ROPE_INIT_FUNCTIONS}


def test_transformers_defaults_are_filled_in():
    config = {key: value for key, value in SIZES.items() if key != "max_position_embeddings"}
    fields = read_teacher({"model_type": "llama", **config}, "x").shared_fields()
    assert fields["rope_parameters"] == {"rope_type": "default", "rope_theta": 10000.0}
    assert (fields["head_dim"], fields["max_position_embeddings"], fields["eos_token_id"]) == (8, 2048, 2)


def test_an_unknown_family_is_told_what_there_is():
    supported = f"supported: {', '.join(FAMILIES)}, and Super Apriel's apriel2"
    said = f"'rwkv'; {supported}. To add a family: one file .*teacher_contract"
    with pytest.raises(ConversionError, match=said):
        read_teacher({"model_type": "rwkv"}, "x")
    with pytest.raises(ConversionError, match="model_type None; supported: llama"):
        read_teacher({}, "x")
    with pytest.raises(ConversionError, match="model_type .'llama'.; supported: llama"):
        read_teacher({"model_type": ["llama"]}, "x")


def test_more_layers_than_tensors_are_refused_at_once():
    config = {"model_type": "llama", **SIZES, "num_hidden_layers": 10**12}
    with pytest.raises(
        ConversionError, match="promises 1000000000000 layers, but the checkpoint has only 1 tens"
    ):
        read_teacher(config, "x", ["lm_head.weight"])

"""Llava around Mistral: two ways to name tensors, nested settings, a vision tower that is not text."""

from __future__ import annotations

from typing import Any

import pytest
from torch import Tensor
from transformers import (
    LlavaConfig,
    LlavaForConditionalGeneration,
    MistralConfig,
    PixtralVisionConfig,
    PreTrainedConfig,
)

from gearshift.convert import ConversionError
from gearshift.convert.teachers import read_teacher
from tests.convert.teacher_contract import TeacherContract
from tests.convert.tiny_teachers import SIZES, Variant

VISION: dict[str, Any] = {
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 16,
    "patch_size": 8,
}


def names_in_memory(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """As other tools write them."""
    renamed = {}
    for name, tensor in tensors.items():
        if name.startswith("language_model.model."):
            name = name.replace("language_model.model.", "model.language_model.")
        elif name.startswith("language_model."):
            name = name.removeprefix("language_model.")
        else:
            name = f"model.{name}"
        renamed[name] = tensor
    return renamed


class TestLlava(TeacherContract):
    model_class = LlavaForConditionalGeneration
    variants = {
        "names in memory": Variant(tensors=names_in_memory),
        "a window": Variant({"sliding_window": 8}),
        "heads of their own size": Variant({"hidden_size": 40, "head_dim": 8}),
        "tied head": Variant({"tie_word_embeddings": True}),
        "tied head, names in memory": Variant({"tie_word_embeddings": True}, tensors=names_in_memory),
        "tied head, said inside only": Variant({"tie_word_embeddings": True}, {"tie_word_embeddings": None}),
        "tied head, said outside only": Variant(
            {"tie_word_embeddings": True}, {"text_config": {"tie_word_embeddings": None}}
        ),
        "yarn, old form": Variant(
            config_json={
                "text_config": {
                    "rope_parameters": None,
                    "rope_theta": 1e6,
                    "rope_scaling": {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32},
                }
            },
        ),
    }
    rich = {"sliding_window": 8, "head_dim": 16}
    broken = [
        ({"text_config": None}, "text_config of model_type None; expected 'mistral'"),
        ({"text_config": {"model_type": "llama"}}, "text_config of model_type 'llama'; expected 'mistral'"),
        ({"text_config": {"num_key_value_heads": 3}}, r"text_config\) has 4 query heads and 3 key/value"),
        (
            {"text_config": {"rope_parameters": {"rope_type": "spiral"}}},
            "rope type 'spiral'; expected one of",
        ),
        ({"quantization_config": {"bits": 4}}, "has 'quantization_config'"),
    ]

    @classmethod
    def make_config(cls, fields: dict[str, Any]) -> PreTrainedConfig:
        text = MistralConfig(**SIZES | fields)
        return LlavaConfig(
            text_config=text, vision_config=PixtralVisionConfig(**VISION), image_token_index=60
        )


def nested(outer: dict[str, Any], text: dict[str, Any]) -> dict[str, Any]:
    return {"model_type": "llava", **outer, "text_config": {"model_type": "mistral", **text}}


def test_what_the_text_config_leaves_out_is_mistrals_default():
    teacher = read_teacher(nested({}, {}), "x")
    fields, attention = teacher.shared_fields(), teacher.attention_fields()
    assert (fields["hidden_size"], fields["intermediate_size"], fields["vocab_size"]) == (4096, 14336, 32000)
    assert (attention["num_heads"], attention["num_key_value_heads"], attention["head_dim"]) == (32, 8, 128)
    assert (fields["bos_token_id"], fields["eos_token_id"]) == (1, 2)
    assert teacher.layer_windows() == (4096,) * 32


def test_token_ids_are_read_outside_first():
    config = nested(
        {"eos_token_id": [7, 8], "pad_token_id": 0}, {**SIZES, "eos_token_id": 3, "bos_token_id": 4}
    )
    fields = read_teacher(config, "x").shared_fields()
    assert (fields["pad_token_id"], fields["bos_token_id"], fields["eos_token_id"]) == (0, 4, [7, 8])


@pytest.mark.parametrize("prefix", ["", "model."])
def test_the_vision_tower_is_extra(prefix: str):
    teacher = read_teacher(nested({}, SIZES), "x")
    extra = [f"{prefix}vision_tower.ln_pre.weight", f"{prefix}multi_modal_projector.linear_1.bias"]
    assert teacher.extra_tensors(["lm_head.weight", *extra, "language_model.model.norm.weight"]) == extra


def test_a_text_config_that_is_no_object():
    with pytest.raises(ConversionError, match="model_type None"):
        read_teacher({"model_type": "llava", "text_config": ["mistral"]}, "x")

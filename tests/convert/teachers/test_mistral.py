"""Mistral: one window for all layers, or none."""

from __future__ import annotations

from typing import Any

from transformers import MinistralForCausalLM, MistralForCausalLM, PreTrainedConfig

from gearshift.convert.teachers import read_teacher
from tests.convert.teacher_contract import TeacherContract
from tests.convert.teachers.test_qwen2 import MIXED
from tests.convert.tiny_teachers import SIZES, Variant

NEMO = {"hidden_size": 40, "num_attention_heads": 4, "head_dim": 8}  # heads narrower than the hidden size


class TestMistral(TeacherContract):
    model_class = MistralForCausalLM
    variants = {
        "a window": Variant({"sliding_window": 8}),
        "no window": Variant({"sliding_window": None}),
        "heads of their own size": Variant(NEMO),
        "tied head": Variant({"tie_word_embeddings": True}),
        "a window and yarn, old form": Variant(
            {"sliding_window": 8},
            {
                "rope_parameters": None,
                "rope_theta": 1e5,
                "rope_scaling": {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32},
            },
        ),
    }
    rich = {"sliding_window": 8}
    broken = [
        ({"hidden_size": None}, "has no 'hidden_size'"),
        ({"sliding_window": 0}, "layer 0 has a sliding window of 0 tokens"),
        ({"sliding_window": "8"}, "Field 'sliding_window'"),
        (
            {"num_attention_heads": 5, "num_key_value_heads": 5, "head_dim": None},
            "no 'head_dim', and hidden_size 32 is not a multiple of its 5 attention heads",
        ),
        ({"num_key_value_heads": 3}, "4 query heads and 3 key/value heads"),
        ({"rope_parameters": {"rope_type": "spiral"}}, "rope type 'spiral'; expected one of"),
    ]


class TestMinistral(TeacherContract):
    model_class = MinistralForCausalLM
    variants = {
        "full and sliding layers": Variant(MIXED),
        "called mistral": Variant(MIXED, {"model_type": "mistral"}),
        "a window": Variant({"sliding_window": 8}, {"layer_types": None}),
    }
    rich = MIXED
    broken = [
        ({"layer_types": ["chunked_attention", "full_attention"]}, "layer of type 'chunked_attention'"),
        ({"layer_types": ["sliding_attention"]}, "must be equal to the number of `layer_types`"),
    ]

    @classmethod
    def make_config(cls, fields: dict[str, Any]) -> PreTrainedConfig:
        return super().make_config({"head_dim": 8} | fields)


def test_an_absent_window_is_the_default_and_null_is_none():
    config = {"model_type": "mistral", **SIZES}
    assert read_teacher(config, "x").layer_windows() == (4096, 4096)
    assert read_teacher({**config, "sliding_window": None}, "x").layer_windows() == (None, None)


def test_a_setting_that_its_class_does_not_know_changes_nothing():
    fields = read_teacher({"model_type": "mistral", **SIZES, "mlp_bias": True}, "x").shared_fields()
    assert fields["mlp_bias"] is False

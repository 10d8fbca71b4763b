"""Qwen3: norms on query and key heads, with and without biases."""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedConfig, Qwen3ForCausalLM

from gearshift.convert.teachers import read_teacher
from tests.convert.teacher_contract import TeacherContract
from tests.convert.teachers.test_qwen2 import FROM_LAYER_1, MIXED
from tests.convert.tiny_teachers import SIZES, Variant


class TestQwen3(TeacherContract):
    model_class = Qwen3ForCausalLM
    variants = {
        "biases": Variant({"attention_bias": True}),
        "full and sliding layers": Variant(MIXED),
        "sliding from a layer on, old form": Variant(FROM_LAYER_1, {"layer_types": None}),
        "wide heads": Variant({"head_dim": 16}),
        "tied head": Variant({"tie_word_embeddings": True}),
        "epsilon that is felt": Variant({"rms_norm_eps": 0.01}),
    }
    rich = {"attention_bias": True, **MIXED}
    broken = [
        ({"hidden_size": None}, "has no 'hidden_size'"),
        ({"num_key_value_heads": 3}, "4 query heads and 3 key/value heads"),
        ({"head_dim": 7}, "refused: .*even rotary dimension"),
        ({"layer_types": ["sliding_attention", "full_attention"]}, "sliding layers without a window"),
        ({"rope_parameters": {"rope_type": "spiral"}}, "rope type 'spiral'; expected one of"),
    ]

    @classmethod
    def make_config(cls, fields: dict[str, Any]) -> PreTrainedConfig:
        return super().make_config({"head_dim": 8} | fields)


def test_an_absent_head_dim_is_128_whatever_the_hidden_size():
    teacher = read_teacher({"model_type": "qwen3", **SIZES}, "x")
    assert teacher.attention_fields()["head_dim"] == teacher.shared_fields()["head_dim"] == 128

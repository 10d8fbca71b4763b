"""Qwen2: biases on queries, keys and values; layers with and without a window."""

from __future__ import annotations

from typing import Any

import pytest
from transformers import Qwen2ForCausalLM

from gearshift.convert.teachers import read_teacher
from tests.convert.teacher_contract import TeacherContract
from tests.convert.tiny_teachers import SIZES, Variant

MIXED: dict[str, Any] = {
    "num_hidden_layers": 3,
    "use_sliding_window": True,
    "sliding_window": 8,
    "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
}
FROM_LAYER_1: dict[str, Any] = {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1}


class TestQwen2(TeacherContract):
    model_class = Qwen2ForCausalLM
    variants = {
        "full and sliding layers": Variant(MIXED),
        "sliding from a layer on, old form": Variant(FROM_LAYER_1, {"layer_types": None}),
        "a window that is not used": Variant({"sliding_window": 8}),
        "tied head": Variant({"tie_word_embeddings": True}),
        "long contexts, as Qwen's model cards say": Variant(
            config_json={
                "rope_scaling": {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32},
                "rope_parameters": None,
                "rope_theta": 1e6,
            }
        ),
        "old form, dynamic": Variant(
            {"max_position_embeddings": 32},
            {
                "rope_parameters": None,
                "rope_theta": 1e6,
                "rope_scaling": {"type": "dynamic", "factor": 2.0},
            },
        ),
    }
    rich = MIXED
    broken = [
        ({"num_hidden_layers": None}, "has no 'num_hidden_layers'"),
        ({"num_key_value_heads": 3}, "4 query heads and 3 key/value heads"),
        ({"num_attention_heads": 0}, "is refused: num_attention_heads is 0; expected at least 1"),
        ({"num_attention_heads": 6}, "no 'head_dim', and hidden_size 32 .* its 6 attention heads"),
        ({"layer_types": ["sliding_attention", "full_attention"]}, "sliding layers without a window"),
        ({"layer_types": ["chunked_attention", "full_attention"]}, "layer of type 'chunked_attention'"),
        ({"layer_types": ["full_attention"]}, "must be equal to the number of `layer_types`"),
        ({"layer_types": ["full_attention", "fast"]}, "entries must be in"),
        ({**FROM_LAYER_1, "layer_types": None, "sliding_window": -3}, "layer 1 has a sliding window of -3"),
        ({"rope_parameters": {"rope_type": "spiral"}}, "rope type 'spiral'; expected one of"),
        (
            {
                "rope_parameters": {
                    "full_attention": {"rope_type": "default", "rope_theta": 1e4},
                    "rope_type": None,
                    "rope_theta": None,
                }
            },
            "one of .* for all layers",
        ),
    ]


@pytest.mark.parametrize(
    ("fields", "windows"),
    [
        ({}, (None, None)),
        ({"sliding_window": 8, "max_window_layers": 0}, (None, None)),
        (FROM_LAYER_1, (None, 8)),
        (MIXED, (8, None, 8)),
    ],
)
def test_windows(fields: dict[str, Any], windows: tuple[int | None, ...]):
    assert read_teacher({"model_type": "qwen2", **SIZES, **fields}, "x").layer_windows() == windows


def test_a_null_head_dim_is_an_absent_one():
    teacher = read_teacher({"model_type": "qwen2", **SIZES, "head_dim": None}, "x")
    assert teacher.attention_fields()["head_dim"] == 8

"""What can be set, what is refused by name, who gets a turn, and guards against another vLLM."""

from __future__ import annotations

import random
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from gearshift.serve.vllm.geometry import CacheTypes, UnservableError, check_servable, demands
from gearshift.serve.vllm.guards import (
    VllmVersionError,
    expect_attributes,
    expect_fields,
    expect_signature,
)
from gearshift.serve.vllm.options import OptionError, Options
from gearshift.serve.vllm.plugin import EngineSettingError, SupernetSettings
from gearshift.serve.vllm.policy import TurnPolicy
from gearshift.supernet import SupernetConfig

ATTENTION = {"num_heads": 4, "num_key_value_heads": 2, "head_dim": 32}
GDN = {"num_heads": 4, "num_key_heads": 2, "key_head_dim": 16, "value_head_dim": 32}
TYPES = CacheTypes(torch.bfloat16, torch.float32, torch.bfloat16)


def config(**changes) -> SupernetConfig:
    fields = {
        "vocab_size": 100,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "head_dim": 32,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
        "mixers": {"full_attention": ATTENTION, "gated_delta_net": GDN},
    }
    return SupernetConfig(**{**fields, **changes})


def test_options_are_read_and_have_defaults():
    assert Options.read({}) == Options() and Options.read("a hash") == Options()
    assert Options.read({"gearshift": {"slots": 6, "max_placements_per_step": 1}}) == Options(6, 1)
    assert [Options().slots_for(layers) for layers in (3, 20, 48, 96)] == [1, 5, 12, 12]


@pytest.mark.parametrize(
    "given", [{"slot": 3}, {"slots": 0}, {"slots": "6"}, {"max_placements_per_step": -1}, [1]]
)
def test_options_that_cannot_be_are_refused(given):
    with pytest.raises(OptionError, match="slots|max_placements"):
        Options.read({"gearshift": given})


@pytest.mark.parametrize(
    ("changes", "ranks", "said"),
    [
        (
            {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}},
            1,
            "layer 0.*dynamic",
        ),
        ({}, 3, "layer 0, full_attention has num_heads 4"),
        ({"mixers": {"full_attention": ATTENTION, "gated_delta_net": GDN}}, 4, "num_key_heads 2"),
    ],
)
def test_what_would_be_computed_differently_is_refused_by_layer_and_name(changes, ranks, said):
    with pytest.raises(UnservableError, match=said):
        check_servable(config(**changes), ranks)


def test_demands_count_layers_and_take_the_largest_page():
    layers = [{"full_attention": {"window": 8}}, {"full_attention": {}}, {"gated_delta_net": {}}]
    found = demands(config(layer_mixers=layers), 16, TYPES, ranks=2)
    assert {kind: demand.layers for kind, demand in found.items()} == {"full": 1, "window": 1, "state": 1}
    assert found["full"].page_bytes == 2 * 16 * 1 * 32 * 2
    assert found["state"].page_bytes == 2 * 32 * 16 * 4 + 3 * (2 * 2 * 16 + 4 * 32) // 2 * 2


def test_without_full_attention_there_is_a_group_through_which_pages_are_cleared():
    layers = [{"full_attention": {"window": 8}, "gated_delta_net": {}}] * 3
    assert set(demands(config(layer_mixers=layers), 16, TYPES, ranks=1)) == {"full", "window", "state"}


@pytest.mark.parametrize("limit", [1, 2, 3])
def test_everybody_who_wants_gets_a_turn_in_every_round(limit):
    policy, wanting, rng = TurnPolicy(limit), "abcde", random.Random(0)
    turns = [policy.choose(rng.sample(wanting, 5)) for _ in range(40)]
    assert all(turn is not None and len(turn) == limit for turn in turns)
    round_ = -(-5 // limit)
    for start in range(len(turns) - round_ + 1):
        assert set().union(*(turn or () for turn in turns[start : start + round_])) == set(wanting)


def test_turns_are_taken_only_where_there_are_too_many():
    assert TurnPolicy(0).choose("abcde") is None
    assert TurnPolicy(2).choose("abab") is None
    policy = TurnPolicy(1)
    assert [policy.choose("ab"), policy.choose("ab"), policy.choose("b"), policy.choose("abc")] == [
        {"a"},
        {"b"},
        None,
        {"a"},
    ]


@dataclass
class Thing:
    kept: int

    def act(self, first: int, second: int = 0) -> None: ...


def test_guards_name_the_difference_and_the_versions_that_work():
    expect_signature(Thing.act, "self", "first")
    expect_fields(Thing, "kept")
    expect_attributes(Thing, "act")
    for check in (
        lambda: expect_signature(Thing.act, "self", "second"),
        lambda: expect_fields(Thing, "kept", "lost"),
        lambda: expect_attributes(Thing, "gone"),
    ):
        with pytest.raises(VllmVersionError, match=r"Thing.*0\.26"):
            check()


def settings(**changes: Any) -> SimpleNamespace:
    """An engine's settings, as far as they are looked at before anything is refused."""
    given = {
        "device_config.device_type": "cuda",
        "model_config.enforce_eager": True,
        "model_config.hf_config": config(),
        "use_v2_model_runner": True,
        "parallel_config.pipeline_parallel_size": 1,
        "parallel_config.decode_context_parallel_size": 1,
        "speculative_config": None,
        "kv_transfer_config": None,
        "lora_config": None,
        "quant_config": None,
        "cache_config.cache_dtype": "auto",
        **changes,
    }
    root = SimpleNamespace()
    for path, value in given.items():
        section, _, name = path.rpartition(".")
        owner = root if not section else root.__dict__.setdefault(section, SimpleNamespace())
        setattr(owner, name, value)
    return root


@pytest.mark.parametrize(
    ("path", "value", "said"),
    [
        ("use_v2_model_runner", False, "set VLLM_USE_V2_MODEL_RUNNER=1"),
        ("parallel_config.pipeline_parallel_size", 2, "use tensor parallelism"),
        ("speculative_config", object(), "speculative decoding"),
        ("kv_transfer_config", object(), "KV connectors"),
        ("lora_config", object(), "LoRA"),
        ("quant_config", object(), "give a supernet in bf16"),
        ("cache_config.cache_dtype", "fp8", "kv_cache_dtype='fp8'; leave it at 'auto'"),
    ],
)
def test_settings_that_cannot_be_honoured_are_refused_by_name(path: str, value: object, said: str):
    with pytest.raises(EngineSettingError, match=f"^the Gearshift plugin does not work with .*{said}"):
        SupernetSettings.verify_and_update_config(settings(**{path: value}))

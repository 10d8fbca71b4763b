"""The configuration: what it refuses, and that it survives a file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from transformers import AutoConfig

from gearshift.errors import GearshiftError
from gearshift.placement import PlacementError
from gearshift.supernet import ConfigError, SupernetConfig

ATTENTION = {"num_heads": 4, "num_key_value_heads": 2, "head_dim": 8}
DELTA_NET = {"num_heads": 4, "num_key_heads": 2, "key_head_dim": 8, "value_head_dim": 16}
KIMI = {"num_heads": 4, "head_dim": 8, "gate_rank": 8}
MIXERS: dict[str, Any] = {
    "full_attention": ATTENTION,
    "sliding_attention": {**ATTENTION, "window": 8},
    "gated_delta_net": DELTA_NET,
    "kimi_delta_attention": KIMI,
}
FIELDS: dict[str, Any] = {
    "vocab_size": 61,
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "head_dim": 8,
    "mixers": MIXERS,
}


def test_it_survives_a_file_and_the_auto_class(tmp_path: Path):
    config = SupernetConfig(**FIELDS, placement="swa*2 kda", rms_norm_eps=1e-5, tie_word_embeddings=True)
    config.save_pretrained(tmp_path)
    for given in (SupernetConfig.from_pretrained(tmp_path), AutoConfig.from_pretrained(tmp_path)):
        assert isinstance(given, SupernetConfig)
        assert given.to_diff_dict() == config.to_diff_dict()
        for name in MIXERS:
            assert given.mixer_config(name) == config.mixer_config(name)


def test_the_default_placement_is_the_first_mixer_everywhere():
    assert SupernetConfig(**FIELDS).placement == "fa*3"
    assert SupernetConfig(**FIELDS).placement_space.num_layers == 3


@pytest.mark.parametrize("key", list(FIELDS))
def test_a_needed_key_that_is_gone_is_named(key: str):
    with pytest.raises(ConfigError, match=f"has no '{key}'"):
        SupernetConfig(**{name: value for name, value in FIELDS.items() if name != key})


@pytest.mark.parametrize("value", ["32", 0, -1, 2.5, True])
@pytest.mark.parametrize("key", [key for key in FIELDS if key != "mixers"])
def test_sizes_are_positive_whole_numbers(key: str, value: object):
    with pytest.raises(ConfigError, match=f"{key} is {value!r}; expected a positive int"):
        SupernetConfig(**{**FIELDS, key: value})


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"rms_norm_eps": "small"}, "rms_norm_eps is 'small'; expected a positive float"),
        ({"rms_norm_eps": float("nan")}, "rms_norm_eps is nan"),
        ({"placement": 3}, "placement is 3; expected text such as"),
        ({"mixers": {}}, "mixers is {}; expected an object with an entry for each mixer"),
        ({"mixers": ["full_attention"]}, "expected an object with an entry for each mixer"),
    ],
)
def test_other_values_that_cannot_be(change: dict[str, Any], said: str):
    with pytest.raises(ConfigError, match=said):
        SupernetConfig(**{**FIELDS, **change})


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"placement": "fa*2"}, "has 2 layers; expected 3"),
        ({"placement": "fa*2 mamba"}, "unknown mixer 'mamba'"),
        ({"mixers": {"mamba": {}}}, "unknown mixer 'mamba'"),
    ],
)
def test_placements_and_mixers_are_checked(change: dict[str, Any], said: str):
    with pytest.raises(PlacementError, match=said):
        SupernetConfig(**{**FIELDS, **change})


@pytest.mark.parametrize(
    ("mixer", "entry", "said"),
    [
        ("full_attention", 3, "mixers.full_attention is 3; expected an object"),
        ("full_attention", {"num_heads": 4}, "lacks num_key_value_heads, head_dim"),
        ("sliding_attention", ATTENTION, "mixers.sliding_attention lacks window"),
        ("full_attention", {**ATTENTION, "head_dims": 1}, "unknown key 'head_dims'.*did you mean 'head_dim'"),
        ("full_attention", {**ATTENTION, "num_key_value_heads": 3}, "3, which does not divide num_heads 4"),
        ("gated_delta_net", {**DELTA_NET, "num_key_heads": 3}, "num_key_heads is 3, which does not divide"),
        ("gated_delta_net", {**DELTA_NET, "gate_activation": "relu"}, "expected 'silu' or 'sigmoid'"),
        ("kimi_delta_attention", {**KIMI, "gate_rank": 0}, "mixers.kimi_delta_attention: gate_rank is 0"),
        ("kimi_delta_attention", {**KIMI, "norm_eps": "x"}, "norm_eps is 'x'; expected a positive float"),
        ("sliding_attention", {**ATTENTION, "window": True}, "window is True; expected a positive int"),
        ("sliding_attention", {**ATTENTION, "window": None}, "window is None; expected a positive int"),
        ("full_attention", {**ATTENTION, "window": 0}, "window is 0; expected a positive int"),
        (
            "full_attention",
            {**ATTENTION, "biases": "q_proj"},
            "biases is 'q_proj'; expected a list of some of",
        ),
        ("full_attention", {**ATTENTION, "biases": ["p_proj"]}, r"biases is \['p_proj'\]; expected a list"),
        ("full_attention", {**ATTENTION, "biases": ["q_proj"] * 2}, "expected a list of .* each once"),
        ("full_attention", {**ATTENTION, "qk_norm": 1}, "qk_norm is 1; expected true or false"),
        (
            "full_attention",
            {**ATTENTION, "rope_parameters": 1e4},
            "rope_parameters is 10000.0; expected an obj",
        ),
        (
            "full_attention",
            {**ATTENTION, "rope_parameters": {}},
            "rope_theta is None; expected a positive float",
        ),
        ("gated_delta_net", {**DELTA_NET, "conv_bias": "no"}, "conv_bias is 'no'; expected true or false"),
        ("gated_delta_net", {**DELTA_NET, "conv_activation": "gelu"}, "expected 'silu' or 'none'"),
        ("kimi_delta_attention", {**KIMI, "conv_bias": 0}, "conv_bias is 0; expected true or false"),
    ],
)
def test_a_mixers_entry_is_checked(mixer: str, entry: object, said: str):
    with pytest.raises(ConfigError, match=said):
        SupernetConfig(**{**FIELDS, "mixers": {**MIXERS, mixer: entry}})


LAYER_MIXERS: list[dict[str, Any]] = [
    {"full_attention": {"window": 4, "biases": ["v_proj", "q_proj"]}, "sliding_attention": {}},
    {"kimi_delta_attention": {"conv_bias": True}, "gated_delta_net": {}},
    {"sliding_attention": {"window": 3}, "full_attention": {}},
]


def test_layers_hold_what_the_config_names_for_them(tmp_path: Path):
    made = SupernetConfig(**FIELDS, layer_mixers=LAYER_MIXERS, mlp_gated=False)
    made.save_pretrained(tmp_path)
    for config in (made, SupernetConfig.from_pretrained(tmp_path)):
        assert isinstance(config, SupernetConfig)
        assert config.placement == "fa gdn fa"
        assert not config.mlp_gated
        assert [config.layer_mixer_names(layer) for layer in range(3)] == [
            ("full_attention", "sliding_attention"),
            ("gated_delta_net", "kimi_delta_attention"),
            ("full_attention", "sliding_attention"),
        ]
        assert config.placement_space.size == 8
        attention = config.mixer_config("fa", 0)
        assert (attention.window, attention.biases) == (4, ("q_proj", "v_proj"))
        assert config.mixer_config("fa", 2) == config.mixer_config("fa")
        assert [config.mixer_config("swa", layer).window for layer in (0, 2)] == [8, 3]
        assert config.mixer_config("kda", 1).conv_bias and not config.mixer_config("kda").conv_bias


def test_without_layer_mixers_every_layer_has_the_common_fields():
    config = SupernetConfig(**FIELDS)
    assert config.mixer_config("swa", 2) == config.mixer_config("swa")
    assert len(config.layer_mixer_names(1)) == 4


def test_fields_that_older_supernets_lack_are_written_only_where_they_say_something():
    """Digests are taken over the config: those of older supernets must stay what they were."""
    assert not {"mlp_gated", "layer_mixers"} & SupernetConfig(**FIELDS).to_dict().keys()
    changed = SupernetConfig(**FIELDS, mlp_gated=False, layer_mixers=LAYER_MIXERS).to_dict()
    assert (changed["mlp_gated"], changed["layer_mixers"]) == (False, LAYER_MIXERS)


def test_absent_options_change_nothing():
    config = SupernetConfig(**FIELDS)
    attention, delta_net = config.mixer_config("fa"), config.mixer_config("gdn")
    assert (attention.biases, attention.qk_norm, attention.window) == ((), False, None)
    assert attention.rope_parameters is None
    assert (delta_net.conv_bias, delta_net.conv_activation) == (False, "silu")
    assert not config.mixer_config("kda").conv_bias
    assert config.mlp_gated


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"mlp_gated": "yes"}, "mlp_gated is 'yes'; expected true or false"),
        (
            {"layer_mixers": {"full_attention": {}}},
            "layer_mixers has {'full_attention': {}}; expected a list",
        ),
        ({"layer_mixers": LAYER_MIXERS[:2]}, "layer_mixers has 2 entries; expected a list of 3"),
        ({"layer_mixers": [*LAYER_MIXERS[:2], {}]}, r"layer_mixers\[2\] is {}; expected an object"),
        ({"layer_mixers": [*LAYER_MIXERS[:2], 3]}, r"layer_mixers\[2\] is 3; expected an object"),
        (
            {"layer_mixers": [*LAYER_MIXERS[:2], {"full_atention": {}}]},
            r"layer_mixers\[2\] has an unknown key 'full_atention'.*did you mean 'full_attention'",
        ),
        (
            {"layer_mixers": [*LAYER_MIXERS[:2], {"full_attention": None}]},
            r"layer_mixers\[2\].full_attention is None; expected an object",
        ),
        (
            {"layer_mixers": [*LAYER_MIXERS[:2], {"full_attention": {"windw": 3}}]},
            r"layer_mixers\[2\].full_attention has an unknown key 'windw'.*did you mean 'window'",
        ),
        (
            {"layer_mixers": [*LAYER_MIXERS[:2], {"full_attention": {"window": 0}}]},
            r"layer_mixers\[2\].full_attention: window is 0; expected a positive int",
        ),
        (
            {"layer_mixers": [{"full_attention": {}}] * 3},
            "mixers has sliding_attention, which no layer of layer_mixers holds",
        ),
    ],
)
def test_layer_mixers_that_cannot_be(change: dict[str, Any], said: str):
    with pytest.raises(ConfigError, match=said):
        SupernetConfig(**{**FIELDS, **change})


def test_a_placement_that_a_layer_does_not_hold():
    with pytest.raises(PlacementError, match="has kda in layer 2; this layer holds only fa, swa"):
        SupernetConfig(**FIELDS, layer_mixers=LAYER_MIXERS, placement="fa kda*2")


def test_a_mixer_that_a_layer_does_not_hold():
    config = SupernetConfig(**FIELDS, layer_mixers=LAYER_MIXERS)
    with pytest.raises(ConfigError, match="layer 1 holds no full_attention; it holds kimi_delta_attention, "):
        config.mixer_config("fa", 1)


def test_a_mixer_it_does_not_hold():
    config = SupernetConfig(**{**FIELDS, "mixers": {"full_attention": ATTENTION}})
    with pytest.raises(ConfigError, match="holds no gated_delta_net; it holds full_attention"):
        config.mixer_config("gdn")


def test_its_errors_are_the_users():
    assert issubclass(ConfigError, GearshiftError)
    assert issubclass(ConfigError, ValueError)

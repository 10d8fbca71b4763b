"""FFNs that differ from layer to layer: what they compute, how they are stored, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from gearshift.supernet import ConfigError, SupernetConfig, load_supernet
from gearshift.supernet.checkpoint import expected_shapes, save_supernet
from tests.supernet.tools import assert_close, random_tokens, tiny_config, tiny_supernet

LAYER_FFNS: list[dict[str, Any]] = [
    {},
    {"intermediate_size": 24},
    {"mlp_gated": False, "hidden_act": "gelu", "mlp_bias": ["up_proj"]},
    {"mlp_gated": False, "mlp_bias": True},
]


def ffn(tensors: dict[str, Tensor], x: Tensor) -> Tensor:
    """What the tensors of one FFN say; GELU in the one that has a bias in one projection."""
    act = functional.silu if ("up_proj.bias" in tensors) == ("down_proj.bias" in tensors) else functional.gelu
    up = functional.linear(x, tensors["up_proj.weight"], tensors.get("up_proj.bias"))
    inner = act(up)
    if "gate_proj.weight" in tensors:
        inner = functional.silu(functional.linear(x, tensors["gate_proj.weight"])) * up
    return functional.linear(inner, tensors["down_proj.weight"], tensors.get("down_proj.bias"))


@torch.no_grad()
def test_each_layer_has_its_own_ffn():
    model = tiny_supernet(1, tiny_config(layer_ffns=LAYER_FFNS))
    x = torch.randn(2, 7, 32, generator=torch.Generator().manual_seed(2))
    for layer in model.model.layers:
        assert_close(layer.mlp(x), ffn(layer.mlp.state_dict(), x))  # pyright: ignore[reportCallIssue, reportAttributeAccessIssue]


def test_its_tensors():
    shapes = expected_shapes(tiny_config(layer_ffns=LAYER_FFNS))
    prefix = "model.layers.{}.mlp."
    names = [{n.removeprefix(prefix.format(i)) for n in shapes if prefix.format(i) in n} for i in range(4)]
    gated = {"gate_proj.weight", "up_proj.weight", "down_proj.weight"}
    ungated = gated - {"gate_proj.weight"}
    assert names == [gated, gated, ungated | {"up_proj.bias"}, ungated | {"up_proj.bias", "down_proj.bias"}]
    assert shapes["model.layers.1.mlp.up_proj.weight"] == (24, 32)


@torch.no_grad()
def test_it_survives_a_file(tmp_path: Path):
    model = tiny_supernet(1, tiny_config(layer_ffns=LAYER_FFNS))
    loaded = load_supernet(save_supernet(model, tmp_path / "out"))
    assert loaded.config.layer_ffns == LAYER_FFNS
    tokens = random_tokens(3, 2, 9)
    assert_close(loaded(tokens).logits, model(tokens).logits)


def test_without_it_the_config_says_nothing_of_it():
    assert "layer_ffns" not in tiny_config().to_dict()


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"layer_ffns": [{}]}, "layer_ffns has 1 entries; expected a list of 4"),
        ({"layer_ffns": {}}, "layer_ffns has {}; expected a list of 4"),
        ({"layer_ffns": [{}, 3, {}, {}]}, r"layer_ffns\[1\] is 3; expected an object"),
        ({"layer_ffns": [{"intermediat_size": 3}, {}, {}, {}]}, "did you mean 'intermediate_size'"),
        ({"layer_ffns": [{"intermediate_size": 0}, {}, {}, {}]}, r"layer_ffns\[0\]: intermediate_size is 0"),
        ({"mlp_bias": ["up_proj"]}, r"mlp_bias is \['up_proj'\]; expected true or false$"),
        (
            {"mlp_bias": ["gate_proj"], "mlp_gated": False},
            "expected true or false, or a list of some of up_proj",
        ),
        ({"mlp_gated": 1}, "mlp_gated is 1; expected true or false"),
    ],
)
def test_what_cannot_be(fields: dict[str, Any], said: str):
    with pytest.raises(ConfigError, match=said):
        tiny_config(**fields)


def test_a_partial_bias_for_all_layers():
    config: SupernetConfig = tiny_config(mlp_gated=False, mlp_bias=["down_proj"])
    assert {name.split("mlp.")[1] for name in expected_shapes(config) if ".mlp." in name} == {
        "up_proj.weight",
        "down_proj.weight",
        "down_proj.bias",
    }

"""The directory that a checkpoint becomes: its config, its tensors bit for bit, and what stays behind."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch

from gearshift.convert import convert_teacher
from gearshift.supernet import load_supernet
from gearshift.supernet.checkpoint import read_config
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
    named_mixers,
    pattern,
    random_tensors,
    save,
    stochastic,
    whole,
)
from tests.convert.tiny_teachers import all_tensors

THINNED = pattern(
    {
        "layer_0": block(stochastic({"attention": ATTENTION, "kda": KDA}, "kda")),
        "layer_1": block(stochastic({"gdn": GDN, "kda": KDA}, "gdn")),
        "layer_2": block({**WINDOW, "window_size": 7}),
    },
    ["layer_0", "layer_1", "layer_2"],
)
# The supernet's names inside mixers -> the format's, written down once more.
INSIDE = {
    "gated_delta_net.conv1d.": "convolution.",
    "kimi_delta_attention.q_conv1d.": "q_conv.",
    "kimi_delta_attention.k_conv1d.": "k_conv.",
    "kimi_delta_attention.v_conv1d.": "v_conv.",
    "kimi_delta_attention.b_proj.": "beta_proj.",
    "kimi_delta_attention.o_norm.": "norm.",
}


def stored_name(name: str, config: Config) -> str:
    """The name in the checkpoint of a supernet's tensor."""
    if not name.startswith("model.layers."):
        return name
    _, _, layer, rest = name.split(".", 3)
    home = f"model.decoder.blocks.{layer}."
    if not rest.startswith("mixers."):
        return home + rest
    _, kind, inner = rest.split(".", 2)
    own = named_mixers(config, int(layer))[kind]
    for ours, theirs in INSIDE.items():
        if f"{kind}.{inner}".startswith(ours):
            inner = inner.replace(ours.removeprefix(f"{kind}."), theirs)
    return f"{home}mixer.mixers.{own}.{inner}" if own else f"{home}mixer.{inner}"


def convert_random(directory: Path, config: Config, **options: Any) -> Path:
    save(directory / "in", config, random_tensors(config))
    return convert_teacher(directory / "in", directory / "out", **options)


@pytest.mark.parametrize("config", [SUPERNET, THINNED], ids=["supernet", "thinned"])
def test_every_tensor_is_its_own_bit_for_bit_and_in_its_own_dtype(config: Config, tmp_path: Path):
    tensors = random_tensors(config)
    tensors = {n: t if n.endswith(("A_log", "dt_bias")) else t.bfloat16() for n, t in tensors.items()}
    out = convert_teacher(save(tmp_path / "in", config, tensors, shards=3), tmp_path / "out")
    given = all_tensors(out)
    assert {stored_name(name, config) for name in given} == set(tensors)
    for name, tensor in given.items():
        own = tensors[stored_name(name, config)]
        assert tensor.dtype == own.dtype
        assert torch.equal(tensor, own)
    assert read_config(out).dtype == torch.bfloat16


def test_a_thinned_supernet_keeps_what_each_layer_holds(tmp_path: Path):
    config = read_config(convert_random(tmp_path, THINNED))
    assert [config.layer_mixer_names(layer) for layer in range(3)] == [
        ("full_attention", "kimi_delta_attention"),
        ("gated_delta_net", "kimi_delta_attention"),
        ("sliding_attention",),
    ]
    assert config.mixer_config("swa", 2).window == 7
    assert config.placement == "kda gdn swa"


def test_a_supernet_whose_layers_are_alike_needs_no_list_of_layers(tmp_path: Path):
    config = read_config(convert_random(tmp_path, SUPERNET))
    assert config.layer_mixers is None and config.layer_ffns is None
    assert config.placement == "fa*3"


def test_the_first_mixer_of_the_file_is_the_main_one(tmp_path: Path):
    config = read_config(convert_random(tmp_path, fixed(stochastic({"z": KDA, "a": GDN}))))
    assert config.placement == "kda*3"


def test_fewer_mixers(tmp_path: Path):
    out = convert_random(tmp_path, fixed(stochastic(ALL, "attention")), mixers=["kda", "swa"])
    config = read_config(out)
    assert set(config.mixers or ()) == {"sliding_attention", "kimi_delta_attention"}
    assert config.placement == "swa*3"
    assert not any("full_attention" in name for name in all_tensors(out))
    load_supernet(out)


def test_what_is_said_of_rotary_embeddings(tmp_path: Path):
    other = {"rotary": {"type": "mistral_1d", "theta": 1e6}}
    config = read_config(
        convert_random(tmp_path, fixed(stochastic({"a": ATTENTION, "w": {**WINDOW, **other}})))
    )
    assert config.rope_parameters == {"rope_type": "default", "rope_theta": 10000.0}
    assert config.mixer_config("fa").rope_parameters is None
    assert config.mixer_config("swa").rope_parameters == {"rope_type": "default", "rope_theta": 1e6}


def test_defaults_of_the_format_where_they_differ_from_the_usual(tmp_path: Path):
    gone = dict.fromkeys(("tie_word_embeddings", "head", "embeddings", "bos_token_id", "eos_token_id"))
    layer = {"mixer": {"type": "kda"}, "mlp": {"intermediate_size": 8}}
    config = read_config(convert_random(tmp_path, whole({"num_blocks": 1, "block": layer}, **gone)))
    assert not config.tie_word_embeddings
    assert config.rms_norm_eps == 1e-5
    assert not config.mlp_gated and not config.mlp_bias and config.hidden_act == "silu"
    assert (config.bos_token_id, config.eos_token_id, config.pad_token_id) == (1, 2, None)
    kda = config.mixer_config("kda")
    assert (kda.num_heads, kda.head_dim, kda.gate_rank, kda.conv_kernel) == (32, 64, 64, 4)
    assert (kda.gate_activation, kda.norm_eps) == ("silu", 1e-5)


VISION = {"model.vision_encoder.adapter.linear_1.bias": torch.arange(3.0)}


@pytest.mark.parametrize("extra", [True, False])
def test_a_vision_encoder_comes_along_or_stays(extra: bool, tmp_path: Path):
    directory = save(
        tmp_path / "in", {**SUPERNET, "model_type": "apriel2"}, random_tensors(SUPERNET) | VISION
    )
    out = convert_teacher(directory, tmp_path / "out", extra=extra)
    kept = all_tensors(out / "teacher_extra")
    assert kept.keys() == (VISION.keys() if extra else set())
    assert all(torch.equal(kept[name], VISION[name]) for name in kept)
    assert not VISION.keys() & all_tensors(out).keys()
    load_supernet(out)


def test_its_programs_are_neither_run_nor_copied(tmp_path: Path):
    directory = save(tmp_path / "in", SUPERNET, random_tensors(SUPERNET))
    for name in ("modeling_apriel2.py", "configuration_apriel2.py"):
        (directory / name).write_text("raise SystemExit('this file was run')")
    (directory / "tokenizer_config.json").write_text("{}")
    out = convert_teacher(directory, tmp_path / "out")
    assert (out / "tokenizer_config.json").exists()
    assert not list(out.glob("*.py"))
    assert "auto_map" not in json.loads((out / "config.json").read_text())
    load_supernet(out)


@pytest.mark.parametrize(("context", "warned"), [(2048, True), (4096, False)])
def test_a_context_that_may_not_be_the_true_one(
    context: int, warned: bool, tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    config = {**SUPERNET, "embeddings": {"max_position_embeddings": context}}
    with caplog.at_level(logging.WARNING):
        out = convert_random(tmp_path, config)
    assert read_config(out).max_position_embeddings == context
    assert ("raise max_position_embeddings" in caplog.text) == warned

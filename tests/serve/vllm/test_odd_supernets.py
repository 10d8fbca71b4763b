"""Supernets with everything that a config can say: thin ones, windows by layer, other ropes and FFNs."""

from __future__ import annotations

import copy
import random
from pathlib import Path

import pytest

pytest.importorskip("vllm", reason="vllm is not installed; tests/serve/vllm/rig says how")

import torch

from gearshift.supernet import SupernetConfig, SupernetForCausalLM, load_supernet, save_supernet
from tests.serve.vllm.harness import Engine, Job, mistakes, random_prompt
from tests.supernet.tools import randomize

ATTENTION = {"num_heads": 4, "num_key_value_heads": 2, "head_dim": 32}
YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 64}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
FIELDS = {
    "vocab_size": 257,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "head_dim": 32,
    "max_position_embeddings": 512,
    "rope_parameters": LLAMA3,
    "tie_word_embeddings": True,
    "mlp_gated": False,
    "mlp_bias": ["up_proj"],
    "hidden_act": "gelu",
    "layer_ffns": [
        {},
        {"mlp_gated": True, "mlp_bias": True, "intermediate_size": 64},
        {},
        {"hidden_act": "relu"},
    ],
    "mixers": {
        "full_attention": {**ATTENTION, "biases": ["q_proj", "v_proj", "o_proj"], "qk_norm": True},
        "sliding_attention": {**ATTENTION, "num_key_value_heads": 4, "window": 30, "rope_parameters": YARN},
        "gated_delta_net": {
            "num_heads": 4,
            "num_key_heads": 2,
            "key_head_dim": 16,
            "value_head_dim": 32,
            "conv_kernel": 3,
            "conv_bias": True,
            "conv_activation": "none",
        },
        "kimi_delta_attention": {
            "num_heads": 2,
            "head_dim": 32,
            "gate_rank": 8,
            "gate_activation": "silu",
            "conv_bias": True,
        },
    },
    "layer_mixers": [
        {"full_attention": {"window": 20}},
        {"full_attention": {}, "gated_delta_net": {}, "sliding_attention": {"window": 10}},
        {"sliding_attention": {}, "kimi_delta_attention": {}},
        {"full_attention": {"biases": []}, "kimi_delta_attention": {}, "gated_delta_net": {}},
    ],
}
PLACEMENTS = ["fa fa swa fa", "fa gdn kda kda", "fa swa swa gdn", "fa gdn swa fa", "fa swa kda kda"]


@pytest.fixture(scope="module")
def reference() -> SupernetForCausalLM:
    torch.manual_seed(0)
    model = SupernetForCausalLM(SupernetConfig(**copy.deepcopy(FIELDS))).eval()
    with torch.no_grad():
        randomize(model)
        model.tie_weights()
    return model


def test_everything_that_a_config_can_say(reference, tmp_path: Path):
    directory = save_supernet(reference, tmp_path / "odd")
    engine = Engine(directory, {"slots": 4})
    engine.poison()
    rng = random.Random(0)
    jobs = [Job(placement, random_prompt(rng, 30, 100)) for placement in PLACEMENTS]
    answers = engine.run(jobs)
    assert [mistakes(reference, job, answer) for job, answer in zip(jobs, answers, strict=True)] == [[]] * 5
    assert engine.blocks_in_use() == 0


def test_a_supernet_without_recurrences_or_with_one_kind_of_cache(reference, tmp_path: Path):
    for held in ({"full_attention"}, {"gated_delta_net"}, {"sliding_attention"}):
        fields = copy.deepcopy(FIELDS)
        fields["mixers"] = {name: fields["mixers"][name] for name in held}
        fields["layer_mixers"] = None
        torch.manual_seed(0)
        model = SupernetForCausalLM(SupernetConfig(**fields)).eval()
        with torch.no_grad():
            randomize(model)
        name = next(iter(held))
        engine = Engine(save_supernet(model, tmp_path / name), {"slots": 4})
        engine.poison()
        jobs = [Job(f"{name}*4", random_prompt(random.Random(seed), 20, 90), 4) for seed in range(3)]
        answers = engine.run(jobs)
        assert [mistakes(model, job, answer) for job, answer in zip(jobs, answers, strict=True)] == [[]] * 3


def test_with_no_setting_at_all_blocks_hold_a_few_states(served_directory: Path):
    engine = Engine(served_directory, block_size=None, additional_config={})
    layout = engine.model.layout
    assert (layout.block_tokens, layout["full"].slots, layout["state"].slots) == (64, 2, 3)
    reference, job = load_supernet(served_directory), Job("fa gdn swa kda fa fa", tuple(range(1, 90)))
    assert mistakes(reference, job, engine.run([job])[0]) == []

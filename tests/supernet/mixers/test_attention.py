"""Attention against Transformers' classes, and windows against a dense masked softmax written here."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import LlamaConfig, Qwen2Config, Qwen3Config
from transformers.models.llama.modeling_llama import LlamaAttention, LlamaRotaryEmbedding
from transformers.models.qwen2.modeling_qwen2 import Qwen2Attention
from transformers.models.qwen3.modeling_qwen3 import Qwen3Attention

from gearshift.supernet import ConfigError
from gearshift.supernet.context import SequenceContext
from gearshift.supernet.mixers.full_attention import FullAttention
from gearshift.supernet.mixers.sliding_attention import SlidingAttention
from tests.supernet.tools import ATTENTION_SIZES, WINDOW, randomize, relative_error, tiny_config

LLAMA = LlamaConfig(hidden_size=32, num_attention_heads=4, num_key_value_heads=2, head_dim=8)
LLAMA._attn_implementation = "eager"


def context_of(length: int) -> SequenceContext:
    positions = torch.arange(length)[None]
    cos_sin = LlamaRotaryEmbedding(LLAMA).forward(torch.zeros(1), positions)
    return SequenceContext(cos_sin, past=0, positions_BT=positions)


def causal_mask(length: int, window: int) -> Tensor:
    """Minus infinity where query i may not see key j."""
    i, j = torch.arange(length)[:, None], torch.arange(length)
    return torch.zeros(length, length).masked_fill((j > i) | (j <= i - window), float("-inf"))


def dense_attention(mixer: FullAttention, x: Tensor, cos_sin: tuple[Tensor, Tensor], mask: Tensor) -> Tensor:
    """Softmax attention of one sequence (T, D), head by head."""
    weights = [mixer.get_parameter(f"{part}_proj.weight") for part in "qkvo"]
    q, k, v = ((x @ weight.T).unflatten(-1, (-1, 8)).transpose(0, 1) for weight in weights[:3])
    cos, sin = cos_sin[0][0], cos_sin[1][0]

    def rotate(y: Tensor) -> Tensor:
        first, second = y.chunk(2, dim=-1)
        return y * cos + torch.cat([-second, first], dim=-1) * sin

    q, k = rotate(q), rotate(k)
    heads = [((q[h] @ k[h // 2].T) * 8**-0.5 + mask).softmax(-1) @ v[h // 2] for h in range(4)]
    return torch.cat(heads, dim=-1) @ weights[3].T


@pytest.mark.parametrize("length", [1, 2, 17])
def test_full_attention_is_llamas(length: int) -> None:
    torch.manual_seed(length)
    config = tiny_config(["full_attention"])
    ours = FullAttention(config, config.mixer_config("full_attention"))
    randomize(ours)
    theirs = LlamaAttention(LLAMA, 0)
    theirs.load_state_dict(ours.state_dict())
    x = torch.randn(2, length, 32)
    context = context_of(length)
    expected = theirs(x, context.cos_sin, causal_mask(length, length)[None, None])[0]
    assert relative_error(ours(x, context, None), expected) < 1e-5


def eager(config: LlamaConfig | Qwen2Config | Qwen3Config) -> LlamaConfig | Qwen2Config | Qwen3Config:
    config._attn_implementation = "eager"
    return config


SIZES: dict[str, Any] = {
    "hidden_size": 32,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_hidden_layers": 1,
    "rms_norm_eps": 1e-5,
}
SLIDING = {"use_sliding_window": True, "sliding_window": WINDOW, "layer_types": ["sliding_attention"]}
ALL = ["q_proj", "k_proj", "v_proj", "o_proj"]
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 1e5,
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
# Transformers' attention, its config, what our mixer's config needs for it, and the window of its mask.
CASES: dict[str, tuple[type[nn.Module], Any, dict[str, Any], int]] = {
    "biases": (LlamaAttention, LlamaConfig(**SIZES, head_dim=8, attention_bias=True), {"biases": ALL}, 99),
    "qwen2": (Qwen2Attention, Qwen2Config(**SIZES), {"biases": ALL[:3]}, 99),
    "qwen2 sliding": (
        Qwen2Attention,
        Qwen2Config(**SIZES, **SLIDING),
        {"biases": ALL[:3], "window": WINDOW},
        WINDOW,
    ),
    "qwen3": (Qwen3Attention, Qwen3Config(**SIZES, head_dim=8), {"qk_norm": True}, 99),
    "own rotary embedding": (
        LlamaAttention,
        LlamaConfig(**SIZES, head_dim=8, rope_parameters=LLAMA3),
        {"rope_parameters": LLAMA3},
        99,
    ),
    "own head size": (LlamaAttention, LlamaConfig(**SIZES, head_dim=12), {"head_dim": 12}, 99),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("length", [1, 17])
def test_options_are_those_of_transformers(length: int, case: str) -> None:
    theirs_class, theirs_config, options, window = CASES[case]
    torch.manual_seed(length)
    sizes = {"full_attention": {**ATTENTION_SIZES, **options}}
    config = tiny_config(["full_attention"], sizes)
    ours = FullAttention(config, config.mixer_config("full_attention"))
    randomize(ours)
    theirs = theirs_class(eager(theirs_config), 0)
    theirs.load_state_dict(ours.state_dict())
    x = torch.randn(2, length, 32)
    context = context_of(length)
    assert context.positions_BT is not None
    cos_sin = LlamaRotaryEmbedding(theirs_config).forward(x, context.positions_BT)
    expected = theirs(x, cos_sin, causal_mask(length, window)[None, None])[0]
    assert relative_error(ours(x, context, None), expected) < 1e-5


def test_the_supernets_rotary_embedding_serves_where_it_can() -> None:
    sizes = {"full_attention": ATTENTION_SIZES, "sliding_attention": {**ATTENTION_SIZES, "window": 4}}
    config = tiny_config(list(sizes), sizes)
    assert all(FullAttention(config, config.mixer_config(name)).rotary_emb is None for name in sizes)


def test_a_rotary_embedding_that_transformers_does_not_have() -> None:
    options = {"rope_parameters": {"rope_type": "spiral", "rope_theta": 1e4}}
    config = tiny_config(["full_attention"], {"full_attention": {**ATTENTION_SIZES, **options}})
    with pytest.raises(ConfigError, match="rope_type 'spiral'; expected one of default, .*llama3"):
        FullAttention(config, config.mixer_config("full_attention"))


@pytest.mark.parametrize("length", [1, WINDOW - 1, WINDOW, WINDOW + 1, 3 * WINDOW + 2])
def test_sliding_attention_sees_a_window_that_counts_the_token_itself(length: int) -> None:
    torch.manual_seed(length)
    config = tiny_config(["sliding_attention"])
    ours = SlidingAttention(config, config.mixer_config("sliding_attention"))
    randomize(ours)
    x = torch.randn(2, length, 32)
    context = context_of(length)
    mask = causal_mask(length, WINDOW)
    assert int(mask[-1].isfinite().sum()) == min(length, WINDOW)
    expected = torch.stack([dense_attention(ours, row, context.cos_sin, mask) for row in x])
    assert relative_error(ours(x, context, None), expected) < 1e-5

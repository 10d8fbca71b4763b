"""With full attention everywhere, a supernet is what Transformers has of other families than Llama."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import (
    ArceeConfig,
    ArceeForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from gearshift.supernet import SupernetConfig, SupernetForCausalLM
from tests.supernet.tools import (
    ATTENTION_SIZES,
    LAYERS,
    assert_close,
    feed,
    generate,
    padded_batch,
    random_tokens,
    randomize,
    tiny_config,
)

WINDOW = 6
SIZES: dict[str, Any] = {
    "vocab_size": 61,
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 256,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
    "rms_norm_eps": 1e-5,
    "eos_token_id": None,
    "bos_token_id": None,
    "pad_token_id": None,
    "tie_word_embeddings": False,
}
LATE_WINDOWS = ["full_attention", "full_attention", "sliding_attention", "sliding_attention"]


@dataclass(frozen=True)
class Family:
    """A family's classes, and the fields by which a supernet becomes one of them."""

    model: Callable[[Any], PreTrainedModel]
    config: PreTrainedConfig
    attention: dict[str, Any]
    shared: dict[str, Any]


FAMILIES = {
    "llama with biases": Family(
        LlamaForCausalLM,
        LlamaConfig(**SIZES, attention_bias=True, mlp_bias=True),
        {"biases": ["q_proj", "k_proj", "v_proj", "o_proj"]},
        {"mlp_bias": True},
    ),
    "mistral": Family(
        MistralForCausalLM, MistralConfig(**SIZES, sliding_window=WINDOW), {"window": WINDOW}, {}
    ),
    "qwen2": Family(
        Qwen2ForCausalLM,
        Qwen2Config(**SIZES, use_sliding_window=True, sliding_window=WINDOW, layer_types=LATE_WINDOWS),
        {"biases": ["q_proj", "k_proj", "v_proj"]},
        {
            "layer_mixers": [
                {"full_attention": {"window": WINDOW} if kind == "sliding_attention" else {}}
                for kind in LATE_WINDOWS
            ]
        },
    ),
    "qwen3": Family(Qwen3ForCausalLM, Qwen3Config(**SIZES), {"qk_norm": True}, {}),
    "arcee": Family(
        ArceeForCausalLM,
        ArceeConfig(**SIZES, mlp_bias=True),
        {},
        {"mlp_gated": False, "mlp_bias": True, "hidden_act": "relu2"},
    ),
}


@pytest.fixture(scope="module", params=FAMILIES)
def pair(request: pytest.FixtureRequest) -> tuple[PreTrainedModel, SupernetForCausalLM]:
    """A random teacher, and the supernet with its weights."""
    family = FAMILIES[request.param]
    torch.manual_seed(1)
    teacher = family.model(family.config).eval()
    randomize(teacher)
    mixers = {"full_attention": {**ATTENTION_SIZES, **family.attention}}
    config = tiny_config(list(mixers), mixers, **family.shared)
    supernet = SupernetForCausalLM(config).eval()
    weights = {
        name.replace(".self_attn.", ".mixers.full_attention."): tensor
        for name, tensor in teacher.state_dict().items()
    }
    supernet.load_state_dict(weights)
    return teacher, supernet


def logits_of(model: torch.nn.Module, tokens: Tensor, **inputs: Any) -> Tensor:
    return model(tokens, **inputs).logits


@torch.no_grad()
def test_logits(pair: tuple[PreTrainedModel, SupernetForCausalLM]) -> None:
    teacher, supernet = pair
    tokens = random_tokens(1, 2, 3 * WINDOW + 1)
    assert_close(logits_of(supernet, tokens), logits_of(teacher, tokens))


@torch.no_grad()
def test_a_batch_padded_on_the_left(pair: tuple[PreTrainedModel, SupernetForCausalLM]) -> None:
    teacher, supernet = pair
    _, batch, mask = padded_batch(3, (19, 4, 11), (0, 15, 8), 19)
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    expected = logits_of(teacher, batch, attention_mask=mask, position_ids=positions)
    given = logits_of(supernet, batch, attention_mask=mask)
    assert_close(given[mask.bool()], expected[mask.bool()])


@torch.no_grad()
def test_cached_decoding(pair: tuple[PreTrainedModel, SupernetForCausalLM]) -> None:
    teacher, supernet = pair
    tokens = random_tokens(5, 2, 20)
    pieces = [3, *[1] * 10, 7]
    assert_close(feed(supernet, supernet.new_cache(), tokens, pieces), logits_of(teacher, tokens))


@torch.no_grad()
def test_generated_tokens(pair: tuple[PreTrainedModel, SupernetForCausalLM]) -> None:
    teacher, supernet = pair
    prompt = random_tokens(6, 1, 4)
    assert torch.equal(
        generate(supernet, prompt, max_new_tokens=20), generate(teacher, prompt, max_new_tokens=20)
    )


def test_each_layer_has_the_window_that_the_config_gives_it(
    pair: tuple[PreTrainedModel, SupernetForCausalLM],
) -> None:
    config = pair[1].config
    assert isinstance(config, SupernetConfig)
    windows = [config.mixer_config("fa", layer).window for layer in range(LAYERS)]
    held = [layer.mixers["full_attention"].window for layer in pair[1].model.layers]  # pyright: ignore
    assert windows == held

"""The supernet that the engines of these tests serve."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from gearshift.convert import convert_teacher
from gearshift.placement import Placement
from gearshift.presets import Preset, write_presets
from gearshift.supernet import load_supernet, save_supernet
from tests.conftest import _write_tokenizer

LAYERS, WINDOW = 6, 24
PRESETS = {"teacher": "fa*6", "window": "swa*6", "fast": "gdn*5 kda", "mixed": "fa gdn swa kda fa swa"}


def write_tiny_supernet(directory: Path) -> Path:
    """Convert a random Llama; then disturb the recurrent mixers, which would start out much like attention.

    Sizes are the smallest that vLLM's CPU attention takes (heads of 32 channels). Weights are large, so that
    the best next token is the best by far.
    """
    config = LlamaConfig(
        vocab_size=_write_tokenizer(directory / "teacher"),
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=512,
        bos_token_id=None,
        eos_token_id=0,
        initializer_range=0.2,
    )
    torch.manual_seed(0)
    LlamaForCausalLM(config).save_pretrained(directory / "teacher")
    converted = convert_teacher(directory / "teacher", directory / "converted", window=WINDOW)
    model, noise = load_supernet(converted), torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "delta" in name:
                scale = 0.1 if parameter.dim() > 1 else 0.3
                parameter.add_(torch.randn(parameter.shape, generator=noise) * scale)
    served = save_supernet(model, directory / "served", source=converted)
    write_presets(served, [Preset(name, Placement.parse(text)) for name, text in PRESETS.items()])
    return served

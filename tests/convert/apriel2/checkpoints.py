"""Small random checkpoints of the format, written as another program would write them."""

from __future__ import annotations

import copy
import json
import math
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from gearshift.placement import PlacementSpace
from tests.convert.apriel2.reference import block_of

HIDDEN, VOCABULARY, LAYERS, INNER = 24, 31, 3, 20
Config = dict[str, Any]
Shapes = Iterator[tuple[str, tuple[int, ...]]]

ROTARY = {"type": "mistral_1d", "theta": 10000.0}
# Heads times their size are not the hidden size, and no two sizes are equal by chance.
ATTENTION: Config = {"type": "attention", "heads": 4, "head_groups": 2, "head_size": 8, "rotary": ROTARY}
WINDOW: Config = {**ATTENTION, "window_size": 4}
GDN: Config = {
    "type": "gdn",
    "value_heads": 4,
    "key_heads": 2,
    "key_head_dim": 6,
    "value_head_dim": 10,
    "convolution_layer": {"kernel_size": 4},
}
KDA: Config = {
    "type": "kda",
    "heads": 3,
    "head_dim": 6,
    "convolution_layer": {"kernel_size": 4},
    "normalization": {"epsilon": 1e-5},
}
MLP: Config = {"type": "mlp", "intermediate_size": INNER, "activation": "silu", "gated": True}
UNGATED: Config = {**MLP, "gated": False}
ALL = {"attention": ATTENTION, "gdn": GDN, "kda": KDA, "sliding_window": WINDOW}
HEAD = {"normalization": {"type": "rms_norm", "epsilon": 1e-5}}


def stochastic(mixers: dict[str, Config], main: str | None = None, **fields: Any) -> Config:
    main_field = {} if main is None else {"main_mixer_name": main}
    return {"type": "stochastic", "mixers": mixers, **main_field, **fields}


def block(mixer: Config, mlp: Config = MLP, **norm: Any) -> Config:
    return {"mixer": mixer, "mlp": mlp, "normalization": {"type": "rms_norm", "epsilon": 1e-5, **norm}}


def fixed(mixer: Config, mlp: Config = MLP, **fields: Any) -> Config:
    """A config whose layers are all alike; fields that are None are left out."""
    decoder = {"type": "fixed", "num_blocks": LAYERS, "block": block(mixer, mlp)}
    return whole(decoder, **fields)


def pattern(blocks: dict[str, Config], names: list[str], layers: int = LAYERS, **fields: Any) -> Config:
    return whole({"type": "pattern", "num_blocks": layers, "blocks": blocks, "pattern": names}, **fields)


def whole(decoder: Config, **fields: Any) -> Config:
    config = {
        "model_type": "apriel2_text",
        "architectures": ["Apriel2ForCausalLM"],
        "auto_map": {"AutoModelForCausalLM": "modeling_apriel2.Apriel2ForCausalLM"},
        "hidden_size": HIDDEN,
        "vocab_size": VOCABULARY,
        "tie_word_embeddings": False,
        "decoder": decoder,
        "embeddings": {"max_position_embeddings": 512},
        "head": HEAD,
        "bos_token_id": 1,
        "eos_token_id": 2,
        **fields,
    }
    return {key: value for key, value in copy.deepcopy(config).items() if value is not None}


SUPERNET = fixed(stochastic(ALL, "attention", sampling_strategy="uniform"))


def tensor_shapes(config: Config) -> Shapes:
    """Name and shape of every tensor that the format has for this config, biases where it says so."""
    hidden, vocabulary = config["hidden_size"], config["vocab_size"]
    yield "model.embed_tokens.weight", (vocabulary, hidden)
    yield "model.norm.weight", (hidden,)
    if not config.get("tie_word_embeddings", False):
        yield "lm_head.weight", (vocabulary, hidden)
    for layer in range(config["decoder"]["num_blocks"]):
        own, prefix = block_of(config, layer), f"model.decoder.blocks.{layer}."
        yield f"{prefix}input_layernorm.weight", (hidden,)
        yield f"{prefix}post_attention_layernorm.weight", (hidden,)
        for name, shape in mlp_shapes(own["mlp"], hidden):
            yield f"{prefix}mlp.{name}", shape
        mixer = own["mixer"]
        mixers = {"": mixer} if mixer["type"] != "stochastic" else mixer["mixers"]
        for key, inner in mixers.items():
            home = f"{prefix}mixer.mixers.{key}." if mixer["type"] == "stochastic" else f"{prefix}mixer."
            for name, shape in SHAPES[inner["type"]](inner, hidden):
                yield home + name, shape


def mlp_shapes(mlp: Config, hidden: int) -> Shapes:
    inner = mlp["intermediate_size"]
    if mlp.get("gated", False):
        yield "gate_proj.weight", (inner, hidden)
    yield from linear("up_proj", (inner, hidden), not mlp.get("gated", False) and says(mlp, "layer_1"))
    yield from linear("down_proj", (hidden, inner), not mlp.get("gated", False) and says(mlp, "layer_2"))


def says(config: Config, layer: str) -> bool:
    enabled = ((config.get(layer) or {}).get("bias") or {}).get("enabled")
    return config.get("add_linear_biases", False) if enabled is None else enabled


def linear(name: str, shape: tuple[int, int], bias: bool) -> Shapes:
    yield f"{name}.weight", shape
    if bias:
        yield f"{name}.bias", shape[:1]


def attention_shapes(mixer: Config, hidden: int) -> Shapes:
    size = mixer["head_size"]
    queries, keys = mixer["heads"] * size, mixer.get("head_groups", mixer["heads"]) * size
    yield from linear("q_proj", (queries, hidden), says(mixer, "query_layer"))
    yield from linear("k_proj", (keys, hidden), says(mixer, "key_layer"))
    yield from linear("v_proj", (keys, hidden), says(mixer, "value_layer"))
    yield from linear("o_proj", (hidden, queries), says(mixer, "dense_layer"))


def gdn_shapes(mixer: Config, hidden: int) -> Shapes:
    heads, dv = mixer.get("value_heads", 32), mixer.get("value_head_dim", 64)
    keys, values = mixer.get("key_heads", 8) * mixer.get("key_head_dim", 64), heads * dv
    yield "in_proj_qkvz.weight", (2 * keys + 2 * values, hidden)
    yield "in_proj_ba.weight", (2 * heads, hidden)
    yield "convolution.weight", (2 * keys + values, 1, mixer["convolution_layer"]["kernel_size"])
    yield "A_log", (heads,)
    yield "dt_bias", (heads,)
    yield "norm.weight", (dv,)
    yield "out_proj.weight", (hidden, values)


def kda_shapes(mixer: Config, hidden: int) -> Shapes:
    heads, d = mixer.get("heads", 32), mixer.get("head_dim", 64)
    for name in "qkv":
        yield f"{name}_proj.weight", (heads * d, hidden)
        yield f"{name}_conv.weight", (heads * d, 1, mixer.get("convolution_layer", {}).get("kernel_size", 4))
    for name in "fg":
        yield f"{name}_a_proj.weight", (d, hidden)
        yield f"{name}_b_proj.weight", (heads * d, d)
    yield "beta_proj.weight", (heads, hidden)
    yield "A_log", (heads,)
    yield "dt_bias", (heads * d,)
    yield "norm.weight", (d,)
    yield "o_proj.weight", (hidden, heads * d)


SHAPES = {"attention": attention_shapes, "gdn": gdn_shapes, "kda": kda_shapes}


def random_tensors(config: Config, seed: int = 0) -> dict[str, Tensor]:
    """Weights that all matter: matrices of unit gain, vectors away from ones and zeros."""
    generator = torch.Generator().manual_seed(seed)
    return {name: random_tensor(name, shape, generator) for name, shape in tensor_shapes(config)}


def random_tensor(name: str, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    noise = torch.randn(shape, generator=generator)
    if "embed_tokens" in name:
        return noise
    if len(shape) > 1:
        return noise * math.prod(shape[1:]) ** -0.5
    return 0.3 * noise + (1.0 if name.endswith("norm.weight") else 0.0)


def save(directory: Path, config: Config, tensors: dict[str, Tensor], shards: int = 1) -> Path:
    """Write the checkpoint; tensors go to the shards by turns, so that every layer straddles them."""
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text(json.dumps(config, indent=2))
    if shards == 1:
        save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
        return directory
    files = [f"model-{number:05}-of-{shards:05}.safetensors" for number in range(1, shards + 1)]
    homes = {name: files[i % shards] for i, name in enumerate(sorted(tensors))}
    for file in files:
        save_file({n: tensors[n] for n in tensors if homes[n] == file}, directory / file)
    index = {"metadata": {"total_size": sum(t.nbytes for t in tensors.values())}, "weight_map": homes}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    return directory


def kind_of(mixer: Config) -> str:
    kinds = {"gdn": "gated_delta_net", "kda": "kimi_delta_attention"}
    attention = "full_attention" if mixer.get("window_size") is None else "sliding_attention"
    return kinds.get(mixer["type"], attention)


def named_mixers(config: Config, layer: int) -> dict[str, str]:
    """The mixers of a layer: the supernet's name -> the checkpoint's."""
    mixer = block_of(config, layer)["mixer"]
    if mixer["type"] != "stochastic":
        return {kind_of(mixer): ""}
    return {kind_of(inner): name for name, inner in mixer["mixers"].items()}


def placements(config: Config, mixed: int = 1) -> list[list[str]]:
    """Every mixer in all layers that hold it, and some drawn at random."""
    layers = [tuple(named_mixers(config, i)) for i in range(config["decoder"]["num_blocks"])]
    space = PlacementSpace(len(layers), tuple(set().union(*layers)), tuple(layers))
    drawn = [space.mostly(mixer) for mixer in space.mixers]
    rng = random.Random(0)
    drawn += [space.sample_uniform(rng) for _ in range(mixed if space.size > 1 else 0)]
    return [list(placement) for placement in dict.fromkeys(drawn)]


def in_names(config: Config, placement: list[str]) -> list[str]:
    """The placement in the checkpoint's own names."""
    return [named_mixers(config, layer)[kind] for layer, kind in enumerate(placement)]

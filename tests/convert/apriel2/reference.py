"""What an ``apriel2`` checkpoint computes, straight from its config and tensors: plain loops, in float64.

Nothing here is shared with the package. One text at a time, one token and one head at a time.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

Tensors = dict[str, Tensor]
ACTIVATIONS: dict[str | None, Callable[[Tensor], Tensor]] = {
    "silu": functional.silu,
    "sigmoid": torch.sigmoid,
    "gelu": functional.gelu,
    "relu": functional.relu,
    "gelu_pytorch_tanh": lambda x: functional.gelu(x, approximate="tanh"),
    None: lambda x: x,
}


def reference_logits(
    config: dict[str, Any], tensors: Tensors, tokens: Sequence[int], names: Sequence[str]
) -> Tensor:
    """Logits (tokens, vocabulary) of one text, with the mixer of this name in each layer.

    A layer without a choice ignores its name.
    """
    tensors = {name: tensor.double() for name, tensor in tensors.items()}
    eps = config.get("head", {}).get("normalization", {}).get("epsilon", 1e-5)
    embedding = tensors["model.embed_tokens.weight"]
    x = torch.stack([embedding[token] for token in tokens])
    for layer, name in enumerate(names):
        block, prefix = block_of(config, layer), f"model.decoder.blocks.{layer}."
        mixer, part = block["mixer"], prefix + "mixer."
        if mixer["type"] == "stochastic":
            mixer, part = mixer["mixers"][name], f"{part}mixers.{name}."
        own = {n.removeprefix(part): t for n, t in tensors.items() if n.startswith(part)}
        x = x + MIXERS[mixer["type"]](mixer, own, rms(x, tensors[prefix + "input_layernorm.weight"], eps))
        own = {
            n.removeprefix(prefix + "mlp."): t for n, t in tensors.items() if n.startswith(prefix + "mlp.")
        }
        x = x + mlp(block["mlp"], own, rms(x, tensors[prefix + "post_attention_layernorm.weight"], eps))
    head = embedding if config.get("tie_word_embeddings", False) else tensors["lm_head.weight"]
    return rms(x, tensors["model.norm.weight"], eps) @ head.T


def block_of(config: dict[str, Any], layer: int) -> dict[str, Any]:
    decoder = config["decoder"]
    if decoder.get("type", "fixed") == "fixed":
        return decoder["block"]
    return decoder["blocks"][decoder["pattern"][layer % len(decoder["pattern"])]]


def rms(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return torch.stack([weight * row / math.sqrt(float((row**2).mean()) + eps) for row in x])


def linear(tensors: Tensors, name: str, x: Tensor) -> Tensor:
    y = x @ tensors[f"{name}.weight"].T
    return y + tensors[f"{name}.bias"] if f"{name}.bias" in tensors else y


def mlp(config: dict[str, Any], tensors: Tensors, x: Tensor) -> Tensor:
    act = ACTIVATIONS[config.get("activation", "silu")]
    if config.get("gated", False):
        return linear(
            tensors, "down_proj", act(linear(tensors, "gate_proj", x)) * linear(tensors, "up_proj", x)
        )
    return linear(tensors, "down_proj", act(linear(tensors, "up_proj", x)))


def attention(config: dict[str, Any], tensors: Tensors, x: Tensor) -> Tensor:
    heads, size = config["heads"], config["head_size"]
    groups, window = config.get("head_groups", heads), config.get("window_size")
    q, k, v = (linear(tensors, f"{name}_proj", x) for name in "qkv")
    frequencies, scale = rotary(config["rotary"], size)
    keys = [[turn(part, s, frequencies, scale) for part in k[s].split(size)] for s in range(len(x))]
    values = [v[s].split(size) for s in range(len(x))]
    rows = []
    for p in range(len(x)):
        outputs = []
        for h in range(heads):
            g = h // (heads // groups)
            query = turn(q[p, h * size : (h + 1) * size], p, frequencies, scale)
            seen = [s for s in range(p + 1) if window is None or p - s < window]
            scores = torch.stack([query @ keys[s][g] for s in seen]) * size**-0.5
            outputs.append(scores.softmax(0) @ torch.stack([values[s][g] for s in seen]))
        rows.append(torch.cat(outputs))
    return linear(tensors, "o_proj", torch.stack(rows))


def rotary(config: dict[str, Any], size: int) -> tuple[list[float], float]:
    """Frequencies of the pairs of channels, and what cosine and sine are multiplied with."""
    theta, kind = config["theta"], config["type"]
    plain = [theta ** (-2 * j / size) for j in range(size // 2)]
    if kind == "mistral_1d":
        return plain, 1.0
    factor, original = config["scale_factor"], config["original_context_length"]
    if kind == "llama3":
        low, high = config["low_frequency_factor"], config["high_frequency_factor"]
        kept = [min(1.0, max(0.0, (original * f / (2 * math.pi) - low) / (high - low))) for f in plain]
    else:
        turns = (config["beta_fast"], config["beta_slow"])
        edges = [size * math.log(original / (t * 2 * math.pi)) / (2 * math.log(theta)) for t in turns]
        low, high = max(math.floor(edges[0]), 0), min(math.ceil(edges[1]), size - 1)
        kept = [1 - min(1.0, max(0.0, (j - low) / max(high - low, 0.001))) for j in range(size // 2)]
    scaled = [f * keep + f / factor * (1 - keep) for f, keep in zip(plain, kept, strict=True)]
    return scaled, config["attention_factor"] if kind == "yarn" else 1.0


def turn(u: Tensor, position: int, frequencies: list[float], scale: float) -> Tensor:
    half, turned = len(frequencies), u.clone()
    for j, frequency in enumerate(frequencies):
        cos, sin = scale * math.cos(position * frequency), scale * math.sin(position * frequency)
        turned[j] = u[j] * cos - u[j + half] * sin
        turned[j + half] = u[j + half] * cos + u[j] * sin
    return turned


def convolve(u: Tensor, weight: Tensor, activation: str | None) -> Tensor:
    taps, rows = weight.shape[2], []
    for p in range(len(u)):
        row = torch.zeros_like(u[p])
        for j in range(taps):
            if p - (taps - 1) + j >= 0:
                row = row + weight[:, 0, j] * u[p - (taps - 1) + j]
        rows.append(row)
    return ACTIVATIONS[activation](torch.stack(rows))


def unit(u: Tensor) -> Tensor:
    return u / math.sqrt(float((u**2).sum()) + 1e-6)


def gated(o: Tensor, z: Tensor, weight: Tensor, eps: float, activation: str) -> Tensor:
    return o / math.sqrt(float((o**2).mean()) + eps) * weight * ACTIVATIONS[activation](z)


def delta_step(
    state: Tensor, q: Tensor, k: Tensor, v: Tensor, decay: Tensor, beta: Tensor
) -> tuple[Tensor, Tensor]:
    """One token of one head: the new state (key channels, value channels) and the output."""
    state = decay[:, None] * state
    key = unit(k)
    state = state + torch.outer(key, beta * (v - state.T @ key))
    return state, state.T @ (unit(q) * len(q) ** -0.5)


def gated_delta_net(config: dict[str, Any], tensors: Tensors, x: Tensor) -> Tensor:
    heads, key_heads = config.get("value_heads", 32), config.get("key_heads", 8)
    dk, dv = config.get("key_head_dim", 64), config.get("value_head_dim", 64)
    eps, convolution = config.get("norm_eps", 1e-5), config["convolution_layer"]
    sizes = [key_heads * dk, key_heads * dk, heads * dv]
    inner = linear(tensors, "in_proj_qkvz", x)
    z = inner[:, sum(sizes) :]
    qkv = convolve(
        inner[:, : sum(sizes)], tensors["convolution.weight"], convolution.get("activation", "silu")
    )
    q, k, v = qkv.split(sizes, dim=1)
    b, a = linear(tensors, "in_proj_ba", x).split(heads, dim=1)
    outputs = []
    for h in range(heads):
        g, state, row = h // (heads // key_heads), torch.zeros(dk, dv, dtype=x.dtype), []
        for p in range(len(x)):
            rate = -tensors["A_log"][h].exp() * functional.softplus(a[p, h] + tensors["dt_bias"][h])
            key, value = slice(g * dk, (g + 1) * dk), slice(h * dv, (h + 1) * dv)
            decay = rate.exp().expand(dk)
            state, o = delta_step(state, q[p, key], k[p, key], v[p, value], decay, b[p, h].sigmoid())
            row.append(gated(o, z[p, value], tensors["norm.weight"], eps, "silu"))
        outputs.append(torch.stack(row))
    return linear(tensors, "out_proj", torch.cat(outputs, dim=1))


def kimi_delta_attention(config: dict[str, Any], tensors: Tensors, x: Tensor) -> Tensor:
    heads, size = config.get("heads", 32), config.get("head_dim", 64)
    norm = config.get("normalization", {})
    eps, act = norm.get("epsilon", 1e-5), norm.get("activation", "silu")
    q, k, v = (convolve(linear(tensors, f"{n}_proj", x), tensors[f"{n}_conv.weight"], "silu") for n in "qkv")
    forget = linear(tensors, "f_b_proj", linear(tensors, "f_a_proj", x))
    gate = linear(tensors, "g_b_proj", linear(tensors, "g_a_proj", x))
    beta = linear(tensors, "beta_proj", x).sigmoid()
    outputs = []
    for h in range(heads):
        own, state, row = slice(h * size, (h + 1) * size), torch.zeros(size, size, dtype=x.dtype), []
        for p in range(len(x)):
            step = functional.softplus(forget[p, own] + tensors["dt_bias"][own])
            decay = (-tensors["A_log"][h].exp() * step).exp()
            state, o = delta_step(state, q[p, own], k[p, own], v[p, own], decay, beta[p, h])
            row.append(gated(o, gate[p, own], tensors["norm.weight"], eps, act))
        outputs.append(torch.stack(row))
    return linear(tensors, "o_proj", torch.cat(outputs, dim=1))


MIXERS = {"attention": attention, "gdn": gated_delta_net, "kda": kimi_delta_attention}

"""Small teachers' attention, mixers made from it, and a slow, plain account of what such a mixer computes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from gearshift.convert.initialize import Initializer, TeacherAttention, seeded_generator
from gearshift.placement import FULL_ATTENTION, GATED_DELTA_NET, KIMI_DELTA_ATTENTION
from gearshift.supernet import SupernetConfig
from gearshift.supernet.context import SequenceContext
from gearshift.supernet.mixers.gated_delta_net import GatedDeltaNet
from gearshift.supernet.mixers.kimi_delta_attention import KimiDeltaAttention

HIDDEN = 24
DELTA_RULES = {GATED_DELTA_NET: GatedDeltaNet, KIMI_DELTA_ATTENTION: KimiDeltaAttention}
BIASES = ("q_proj", "k_proj", "v_proj")


@dataclass(frozen=True)
class Sizes:
    """Key/value heads, query heads to each of them, and channels of a head."""

    groups: int = 2
    group: int = 2
    head_dim: int = 4

    @property
    def heads(self) -> int:
        return self.groups * self.group

    def fields(self, biases: tuple[str, ...] = ()) -> dict[str, Any]:
        sizes = {"num_heads": self.heads, "num_key_value_heads": self.groups, "head_dim": self.head_dim}
        return {**sizes, "biases": list(biases), "qk_norm": False}


def attention_of(sizes: Sizes, biases: tuple[str, ...] = (), qk_norm: bool = False) -> TeacherAttention:
    generator = torch.Generator().manual_seed(sizes.groups * 100 + sizes.group * 10 + sizes.head_dim)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    q, kv = sizes.heads * sizes.head_dim, sizes.groups * sizes.head_dim
    rows = {"q_proj": q, "k_proj": kv, "v_proj": kv, "o_proj": HIDDEN}
    columns = {**dict.fromkeys(BIASES, HIDDEN), "o_proj": q}
    return TeacherAttention(
        # A list: a generator would be read only after the other arguments, and biases would move the weights.
        *[normal(rows[name], columns[name]) for name in rows],
        norm=0.5 + torch.rand(HIDDEN, generator=generator),
        head_dim=sizes.head_dim,
        biases={name: 5 * normal(rows[name]) for name in biases},
        q_norm=0.5 + torch.rand(sizes.head_dim, generator=generator) if qk_norm else None,
        k_norm=0.5 + torch.rand(sizes.head_dim, generator=generator) if qk_norm else None,
    )


def config_of(initializer: Initializer, sizes: Sizes, biases: tuple[str, ...] = ()) -> SupernetConfig:
    names = (FULL_ATTENTION, *DELTA_RULES)
    return SupernetConfig(
        vocab_size=8,
        hidden_size=HIDDEN,
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=sizes.heads,
        head_dim=sizes.head_dim,
        mixers={name: initializer.mixer_fields(name, sizes.fields(biases), 4) for name in names},
    )


def start(
    initializer: Initializer, name: str, sizes: Sizes, attention: TeacherAttention, seed: int = 0
) -> dict[str, Tensor]:
    config = config_of(initializer, sizes, tuple(attention.biases))
    return initializer.tensors(name, config, 0, attention, seeded_generator(seed, 0, name))


def build(initializer: Initializer, name: str, sizes: Sizes, attention: TeacherAttention) -> nn.Module:
    config = config_of(initializer, sizes, tuple(attention.biases))
    mixer = DELTA_RULES[name](config, config.mixer_config(name))
    mixer.load_state_dict(start(initializer, name, sizes, attention), strict=True)
    return mixer.eval()


def inputs(attention: TeacherAttention, tokens: int = 64) -> Tensor:
    x = torch.randn(1, tokens, HIDDEN, generator=torch.Generator().manual_seed(5))
    return attention.norm * x / x.square().mean(-1, keepdim=True).sqrt()


def run(mixer: nn.Module, x: Tensor) -> Tensor:
    return mixer(x, SequenceContext((torch.ones(1), torch.zeros(1)), 0, None, None, None), None)


def projections(name: str, tensors: dict[str, Tensor], head_dim: int) -> dict[str, Tensor]:
    """q, k, v as (heads, K, D), from either delta rule's layout."""
    if name == GATED_DELTA_NET:
        rows = tensors["in_proj_qkvz.weight"]
        size = tensors["out_proj.weight"].shape[1]
        key_size = (len(rows) - 2 * size) // 2
        parts = rows.split([key_size, key_size, size, size])[:3]
    else:
        parts = tuple(tensors[f"{part}_proj.weight"] for part in "qkv")
    return {part: weight.unflatten(0, (-1, head_dim)) for part, weight in zip("qkv", parts, strict=True)}


def taps(tensors: dict[str, Tensor]) -> Tensor:
    """Of all convolutions, (channels, 1, taps): q, k and v in turn."""
    return torch.cat([tensor for key, tensor in tensors.items() if "conv1d.weight" in key])


def read_out(
    attention: TeacherAttention, x_TD: Tensor, pairs: list[int], scales: list[float], time_scales: Tensor
) -> Tensor:
    """What an aligned mixer shall compute, one head and one token after the other, with explicit biases.

    Args:
        attention: the teacher's.
        x_TD: inputs.
        pairs: for every query head, the key/value head it reads.
        scales: what queries, keys and values are multiplied with before SiLU.
        time_scales: tokens after which each head's memory fades to 1/e.
    """
    x_TD = x_TD.double()
    size, out = attention.head_dim, torch.zeros(len(x_TD), len(attention.o_proj), dtype=torch.float64)
    for head, pair in enumerate(pairs):
        read = []
        for part, index, scale in zip(BIASES, (head, pair, pair), scales, strict=True):
            rows = slice(index * size, (index + 1) * size)
            wanted = x_TD @ getattr(attention, part)[rows].double().T
            if part in attention.biases:
                wanted = wanted + attention.biases[part][rows].double()
            read.append(functional.silu(scale * wanted))
        q, k, v = read
        q, k = (part / (part.square().sum(1, keepdim=True) + 1e-6).sqrt() for part in (q, k))
        values = _value_size(attention, pair)
        o_proj = attention.o_proj[:, head * size : (head + 1) * size].double()
        memory = torch.zeros(size, size, dtype=torch.float64)
        for token in range(len(x_TD)):
            memory = memory * torch.exp(-1 / time_scales[head].double())
            memory = memory + 0.5 * torch.outer(k[token], v[token] - memory.T @ k[token])
            read_TK = memory.T @ q[token] * size**-0.5
            normed = read_TK / (read_TK.square().mean() + 1e-5).sqrt()
            out[token] += o_proj @ (0.5 * values * normed)
    return out


def _value_size(attention: TeacherAttention, pair: int) -> float:
    """Root mean square of one value head over inputs drawn at random; none is taken from the code tested."""
    rows = slice(pair * attention.head_dim, (pair + 1) * attention.head_dim)
    squares = (attention.v_proj[rows].double() * attention.norm.double()).square().sum()
    if "v_proj" in attention.biases:
        squares = squares + attention.biases["v_proj"][rows].double().square().sum()
    return float((squares / attention.head_dim).sqrt())

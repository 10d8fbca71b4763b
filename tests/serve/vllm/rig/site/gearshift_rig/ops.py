"""The native operations of vLLM's CPU backend that a dense model calls, in plain torch.

They are strict where a kernel may be lax: attention reads no token that its query must not see, so whatever
lies in other places of the cache (NaN, in the tests) shows if somebody reads it by mistake.

Shape letters: N tokens of a step, H query heads, G key/value heads, D channels of a head, P pages, S tokens
of a page, R requests, W pages of a request.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

_libraries: list[torch.library.Library] = []


def define() -> None:
    """Define the operations in torch's namespace ``_C``, once a process."""
    if _libraries:
        return
    library = torch.library.Library("_C", "FRAGMENT")
    _libraries.append(library)
    for schema, function in _OPERATIONS.items():
        library.define(schema)
        library.impl(schema.split("(")[0], function, "CompositeExplicitAutograd")


def _init_memory(nodes: list[int]) -> str:
    return ""


def _scheduler_metadata(*arguments: Any) -> Tensor:
    """How native attention splits its work; the one here needs no plan."""
    return torch.empty(0, dtype=torch.int32)


def _store(
    key_NGD: Tensor, value_NGD: Tensor, keys_PGSD: Tensor, values_PGSD: Tensor, slots_N: Tensor, *_: Any
) -> None:
    """Write new keys and values to their slots; a negative slot is padding."""
    tokens = (slots_N >= 0).nonzero().flatten()
    slots, size = slots_N[tokens].long(), keys_PGSD.shape[2]
    keys_PGSD[slots // size, :, slots % size] = key_NGD[tokens]
    values_PGSD[slots // size, :, slots % size] = value_NGD[tokens]


def _attend(
    query_NHD: Tensor,
    keys_PGSD: Tensor,
    values_PGSD: Tensor,
    out_NHD: Tensor,
    starts_R: Tensor,
    lengths_R: Tensor,
    scale: float,
    causal: bool,
    alibi: Tensor | None,
    window: int,
    pages_RW: Tensor,
    *_: Any,
) -> None:
    """Causal attention of each request's new tokens to its cached ones, by a window if it is positive."""
    assert causal and alibi is None
    borders = starts_R.tolist()
    for request, length in enumerate(lengths_R.tolist()):
        begin, end = borders[request], borders[request + 1]
        if begin == end:
            continue
        first_query = length - (end - begin)
        first = max(0, first_query - window + 1) if window > 0 else 0
        keys, values = (
            _gather(cache, pages_RW[request], first, length) for cache in (keys_PGSD, values_PGSD)
        )
        visible = _visible(first_query, length, first, window)
        out_NHD[begin:end] = _softmax_attention(query_NHD[begin:end], keys, values, visible, scale)


def _gather(cache_PGSD: Tensor, pages_W: Tensor, first: int, length: int) -> Tensor:
    """The tokens from ``first`` to ``length`` of one request, (G, tokens, D)."""
    positions, size = torch.arange(first, length), cache_PGSD.shape[2]
    return cache_PGSD[pages_W[positions // size].long(), :, positions % size].transpose(0, 1)


def _visible(first_query: int, length: int, first_key: int, window: int) -> Tensor:
    queries = torch.arange(first_query, length)[:, None]
    keys = torch.arange(first_key, length)[None]
    seen = keys <= queries
    return seen & (queries - keys < window) if window > 0 else seen


def _softmax_attention(q_NHD: Tensor, k_GSD: Tensor, v_GSD: Tensor, visible: Tensor, scale: float) -> Tensor:
    groups = q_NHD.shape[1] // k_GSD.shape[0]
    k_HSD, v_HSD = (x.repeat_interleave(groups, dim=0) for x in (k_GSD, v_GSD))
    scores = (q_NHD.transpose(0, 1) @ k_HSD.transpose(1, 2)) * scale
    weights = scores.masked_fill(~visible, float("-inf")).softmax(-1)
    return (weights @ v_HSD).transpose(0, 1)


def _silu_and_mul(out: Tensor, x: Tensor) -> None:
    gate, up = x.chunk(2, dim=-1)
    out.copy_(functional.silu(gate) * up)


def _rotate(
    positions_N: Tensor,
    query: Tensor,
    key: Tensor | None,
    head_size: int,
    cos_sin: Tensor,
    neox: bool,
    *_: Any,
) -> None:
    """Rotary embedding in place; the halves of a head are its pairs."""
    assert neox
    cos, sin = (x[:, None] for x in cos_sin[positions_N].chunk(2, dim=-1))
    for tensor in (query, key):
        if tensor is None:
            continue
        heads = tensor.view(len(positions_N), -1, head_size)[..., : 2 * cos.shape[-1]]
        a, b = heads.clone().chunk(2, dim=-1)
        heads.copy_(torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1))


_OPERATIONS: dict[str, Callable[..., Any]] = {
    "init_cpu_memory_env(int[] nodes) -> str": _init_memory,
    "get_scheduler_metadata(int requests, int heads, int kv_heads, int head_dim, Tensor lengths,"
    " ScalarType dtype, Tensor starts, bool causal, int window, str isa, bool split,"
    " Tensor? dynamic_causal=None) -> Tensor": _scheduler_metadata,
    "cpu_attn_reshape_and_cache(Tensor key, Tensor value, Tensor(a!) keys, Tensor(b!) values, Tensor slots,"
    " str isa, float k_scale=1.0, float v_scale=1.0, str dtype='auto') -> ()": _store,
    "cpu_attention_with_kv_cache(Tensor query, Tensor keys, Tensor values, Tensor(a!) out, Tensor starts,"
    " Tensor lengths, float scale, bool causal, Tensor? alibi, int window, Tensor pages, float softcap,"
    " Tensor metadata, Tensor? sinks, Tensor? dynamic_causal=None, float k_scale=1.0, float v_scale=1.0,"
    " str dtype='auto') -> ()": _attend,
    "silu_and_mul(Tensor(a!) out, Tensor x) -> ()": _silu_and_mul,
    "rotary_embedding(Tensor positions, Tensor(a!) query, Tensor(b!)? key, int head_size, Tensor cos_sin,"
    " bool neox, int offset=0, bool inverse=False) -> ()": _rotate,
}

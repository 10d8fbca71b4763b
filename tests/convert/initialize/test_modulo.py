"""The published recipe, mistakes included."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn.functional import softplus

from gearshift.convert.initialize import Aligned, Modulo, TeacherAttention
from gearshift.placement import GATED_DELTA_NET, KIMI_DELTA_ATTENTION
from tests.convert.initialize.tools import (
    BIASES,
    DELTA_RULES,
    Sizes,
    attention_of,
    build,
    inputs,
    projections,
    run,
    start,
    taps,
)

MODULO = Modulo()
PUBLISHED = Sizes(groups=8, group=4, head_dim=2)  # 32 query heads, 8 key/value heads
each_rule = pytest.mark.parametrize("name", DELTA_RULES)


def head_of(attention: TeacherAttention, part: str, index: int) -> Tensor:
    size = attention.head_dim
    return getattr(attention, f"{part}_proj")[index * size : (index + 1) * size]


def rightly_paired(initializer: Aligned | Modulo, name: str) -> int:
    """Query heads whose key and value come from the teacher's head for them."""
    attention = attention_of(PUBLISHED)
    made = projections(name, start(initializer, name, PUBLISHED, attention), PUBLISHED.head_dim)
    key_heads = made["k"].repeat_interleave(PUBLISHED.heads // len(made["k"]), dim=0)
    right = 0
    for head in range(PUBLISHED.heads):
        own = head // PUBLISHED.group
        right += torch.equal(key_heads[head], head_of(attention, "k", own)) and torch.equal(
            made["v"][head], head_of(attention, "v", own)
        )
    return right


@each_rule
def test_28_of_32_heads_are_mispaired(name: str):
    assert PUBLISHED.heads - rightly_paired(MODULO, name) == 28
    assert rightly_paired(Aligned(), name) == 32


def test_gated_delta_net_keeps_the_first_8_of_32_query_heads_and_all_values():
    attention = attention_of(PUBLISHED)
    made = projections(GATED_DELTA_NET, start(MODULO, GATED_DELTA_NET, PUBLISHED, attention), 2)
    assert {part: len(heads) for part, heads in made.items()} == {"q": 8, "k": 8, "v": 32}
    for head in range(8):
        assert torch.equal(made["q"][head], head_of(attention, "q", head))
        assert torch.equal(made["k"][head], head_of(attention, "k", head))
    for head in range(32):
        assert torch.equal(made["v"][head], head_of(attention, "v", head % 8))


def test_kimi_delta_attention_keeps_all_query_heads_and_tiles_keys_and_values():
    attention = attention_of(PUBLISHED)
    made = projections(KIMI_DELTA_ATTENTION, start(MODULO, KIMI_DELTA_ATTENTION, PUBLISHED, attention), 2)
    for head in range(32):
        assert torch.equal(made["q"][head], head_of(attention, "q", head))
        assert torch.equal(made["k"][head], head_of(attention, "k", head % 8))
        assert torch.equal(made["v"][head], head_of(attention, "v", head % 8))


@torch.no_grad()
def test_gated_delta_net_adds_nothing():
    attention = attention_of(Sizes())
    assert (run(build(MODULO, GATED_DELTA_NET, Sizes(), attention), inputs(attention)) == 0).all()
    assert run(build(MODULO, KIMI_DELTA_ATTENTION, Sizes(), attention), inputs(attention)).std() > 0


@each_rule
def test_constants_are_the_published_ones(name: str):
    attention = attention_of(Sizes())
    tensors = start(MODULO, name, Sizes(), attention)
    weight = taps(tensors)
    assert (weight[:, :, :-1] == 0).all() and (weight[:, :, -1] == 0.5).all()
    decay = tensors["A_log"].exp()[:, None] * softplus(tensors["dt_bias"]).view(4, -1)
    torch.testing.assert_close(torch.exp(-decay), torch.full_like(decay, 0.93303), rtol=0, atol=1e-4)
    output, norm = ("out_proj", "norm") if name == GATED_DELTA_NET else ("o_proj", "o_norm")
    assert torch.equal(tensors[f"{output}.weight"], attention.o_proj)
    assert (tensors[f"{norm}.weight"] == 1).all()


@each_rule
def test_biases_and_norms_of_heads_are_dropped(name: str):
    bare = start(MODULO, name, Sizes(), attention_of(Sizes()))
    full = start(MODULO, name, Sizes(), attention_of(Sizes(), (*BIASES, "o_proj"), qk_norm=True))
    assert bare.keys() == full.keys()
    assert all(torch.equal(full[key], tensor) for key, tensor in bare.items())


def test_random_parts_are_uniform_within_the_published_bounds():
    attention = attention_of(PUBLISHED)
    first, second = (start(MODULO, KIMI_DELTA_ATTENTION, PUBLISHED, attention, seed) for seed in (0, 1))
    moved = {key for key in first if not torch.equal(first[key], second[key])}
    assert moved == {f"{gate}_{side}_proj.weight" for gate in "fg" for side in "ab"} | {"b_proj.weight"}
    for key in moved:
        bound = first[key].shape[1] ** -0.5
        assert 0.8 * bound < first[key].abs().max() <= bound
        assert first[key].mean().abs() < 0.25 * bound

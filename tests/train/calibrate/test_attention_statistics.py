"""Distances of attention against a slow loop over heads, queries and keys."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from gearshift.placement import FULL_ATTENTION
from gearshift.supernet import SequenceContext
from gearshift.supernet.mixers.full_attention import FullAttention
from gearshift.train.calibrate import attention_statistics
from gearshift.train.calibrate.attention_statistics import AttentionDistances
from gearshift.train.calibrate.layers import plain_context
from tests.supernet.tools import MIXER_SIZES, randomize, tiny_config
from tests.train.calibrate.tools import CPU

HEADS, GROUPS, SIZE = 4, 2, 8
RESTING = 4


def make(window: int | None = None) -> FullAttention:
    torch.manual_seed(1)
    sizes = MIXER_SIZES[FULL_ATTENTION] | {"window": window, "biases": ["q_proj", "k_proj"]}
    config = tiny_config(mixers=(FULL_ATTENTION,), sizes={FULL_ATTENTION: sizes})
    attention = FullAttention(config, config.mixer_config(FULL_ATTENTION))
    randomize(attention)
    attention.q_proj.weight.data.mul_(4)
    return attention.requires_grad_(False)


def context_of(tokens: int) -> SequenceContext:
    return plain_context(tiny_config(), tokens, CPU)


def inputs(batch: int, tokens: int, seed: int = 0) -> Tensor:
    return torch.randn(batch, tokens, 32, generator=torch.Generator().manual_seed(seed))


def turned(vector: Tensor, position: int) -> Tensor:
    """A head's vector after the rotary embedding (arXiv 2104.09864) of its position."""
    angles = torch.tensor([position * 10000.0 ** (-2 * i / SIZE) for i in range(SIZE // 2)]).double()
    first, second = vector.double().chunk(2)
    return torch.cat(
        [first * angles.cos() - second * angles.sin(), second * angles.cos() + first * angles.sin()]
    )


def slow_mass(attention: FullAttention, x_BTD: Tensor, queries: list[int]) -> Tensor:
    tokens = x_BTD.shape[1]
    mass = torch.zeros(HEADS, tokens, dtype=torch.float64)
    for x_TD in x_BTD:
        q_TD, k_TD = attention.q_proj(x_TD), attention.k_proj(x_TD)
        for head in range(HEADS):
            group = head // (HEADS // GROUPS)
            for query in queries:
                q = turned(q_TD[query, head * SIZE : (head + 1) * SIZE], query)
                first = 0 if attention.window is None else max(0, query - attention.window + 1)
                scores = [
                    float(q @ turned(k_TD[key, group * SIZE : (group + 1) * SIZE], key)) / math.sqrt(SIZE)
                    for key in range(first, query + 1)
                ]
                total = sum(math.exp(score) for score in scores)
                for key, score in zip(range(first, query + 1), scores, strict=True):
                    if key >= RESTING:
                        mass[head, query - key] += math.exp(score) / total
    return mass


@pytest.mark.parametrize("window", [None, 1, 6, 14, 50])
@pytest.mark.parametrize("tokens", [13, 20])
def test_mass_is_that_of_the_slow_loop(window: int | None, tokens: int):
    attention, distances, x_BTD = make(window), AttentionDistances(), inputs(2, tokens)
    distances.add(attention, x_BTD, context_of(tokens))
    assert distances.mass_HT is not None
    expected = slow_mass(attention, x_BTD, list(range(tokens // 2, tokens)))
    torch.testing.assert_close(distances.mass_HT, expected, rtol=1e-4, atol=1e-6)


def test_of_many_queries_some_are_looked_at(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(attention_statistics, "MOST_QUERIES", 3)
    attention, distances, x_BTD = make(), AttentionDistances(), inputs(1, 21)
    distances.add(attention, x_BTD, context_of(21))
    assert distances.mass_HT is not None
    torch.testing.assert_close(
        distances.mass_HT, slow_mass(attention, x_BTD, [10, 15, 20]), rtol=1e-4, atol=1e-6
    )


def test_batches_add_up():
    attention, context, x_BTD = make(), context_of(16), inputs(5, 16)
    whole, parts = AttentionDistances(), AttentionDistances()
    whole.add(attention, x_BTD, context)
    for part in x_BTD.split([2, 3]):
        parts.add(attention, part, context)
    assert whole.mass_HT is not None
    torch.testing.assert_close(parts.mass_HT, whole.mass_HT, rtol=1e-5, atol=1e-7)
    assert torch.equal(parts.time_scales(), whole.time_scales())


@pytest.mark.parametrize("tokens", [2, 3, 4, 5])
def test_a_short_window_gives_numbers_too(tokens: int):
    distances = AttentionDistances()
    distances.add(make(), inputs(1, tokens), context_of(tokens))
    scales = distances.time_scales()
    assert scales.shape == (HEADS,)
    assert (scales >= 1).all()
    assert scales.isfinite().all()


def scales_of(mass_HT: Tensor) -> list[float]:
    distances = AttentionDistances()
    distances.mass_HT = mass_HT.double()
    return distances.time_scales().tolist()


@given(st.lists(st.integers(0, 199), min_size=1, max_size=5), st.floats(1e-3, 1e6))
def test_all_attention_at_one_distance(places: list[int], amount: float):
    """A memory that halves within so many tokens fades to 1/e within 1 / log 2 times as many."""
    mass = torch.zeros(len(places), 200)
    mass[torch.arange(len(places)), torch.tensor(places)] = amount
    assert scales_of(mass) == pytest.approx([(place + 1) / math.log(2) for place in places])


@given(st.lists(st.integers(0, 9), min_size=10, max_size=10).filter(any))
def test_the_median_splits_the_mass(amounts: list[int]):
    (scale,) = scales_of(torch.tensor([amounts]))
    median = round(scale * math.log(2))
    half = sum(amounts) / 2
    assert sum(amounts[:median]) >= half > sum(amounts[: median - 1]) or (median == 1 and amounts[0] >= half)


@pytest.mark.parametrize("fade", [4.0, 20.0, 100.0])
def test_a_head_that_fades_like_a_memory_gets_its_time_scale(fade: float):
    mass = torch.exp(-torch.arange(4000) / fade)[None]
    assert scales_of(mass) == pytest.approx([fade], abs=1 / math.log(2))


def test_no_attention_at_all_is_the_shortest_memory():
    assert scales_of(torch.zeros(1, 10)) == pytest.approx([1 / math.log(2)])

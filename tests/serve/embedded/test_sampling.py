"""Tokens out of logits."""

from __future__ import annotations

from collections import Counter

import pytest
import torch

from gearshift.serve.embedded.generation import Sampling
from gearshift.serve.embedded.sampling import Sampler

CPU = torch.device("cpu")
LOGITS = torch.tensor([[0.0, 3.0, 1.0, 2.9, -1.0]])


def draws(sampling: Sampling, count: int = 300) -> Counter[int]:
    sampler = Sampler(sampling, CPU)
    return Counter(sampler.sample(LOGITS).id for _ in range(count))


@pytest.mark.parametrize("temperature", [0.0, 1e-9, 1e-40])
def test_without_temperature_the_likeliest(temperature: float):
    assert draws(Sampling(1, temperature)) == {1: 300}


def test_frequencies_follow_the_logits():
    seen = draws(Sampling(1, temperature=0.7), 4000)
    expected = (LOGITS[0] / 0.7).softmax(-1)
    for token, share in enumerate(expected.tolist()):
        assert seen[token] / 4000 == pytest.approx(share, abs=0.03)


@pytest.mark.parametrize(
    ("sampling", "possible"),
    [
        (Sampling(1, top_k=1), {1}),
        (Sampling(1, top_k=2), {1, 3}),
        (Sampling(1, top_k=1000), {0, 1, 2, 3, 4}),
        (Sampling(1, top_p=0.1), {1}),
        (Sampling(1, top_p=0.7), {1, 3}),
        (Sampling(1, temperature=2.0, top_k=3, top_p=0.99), {1, 2, 3}),
    ],
)
def test_truncation_leaves_only_the_likeliest(sampling: Sampling, possible: set[int]):
    assert set(draws(sampling, 2000)) == possible


def test_a_seed_repeats_its_draws_and_others_do_not():
    def row(seed: int) -> list[int]:
        sampler = Sampler(Sampling(1, seed=seed), CPU)
        return [sampler.sample(LOGITS).id for _ in range(40)]

    assert row(5) == row(5)
    assert row(5) != row(6)
    assert row(-(2**63)) != row(2**63 - 1 + 127)


def test_draws_leave_the_global_generator_alone():
    torch.manual_seed(0)
    before = torch.get_rng_state()
    draws(Sampling(1))
    assert torch.equal(torch.get_rng_state(), before)


def test_logprobs_are_those_of_the_model():
    token = Sampler(Sampling(1, temperature=0.0, logprobs=2), CPU).sample(LOGITS)
    expected = LOGITS[0].log_softmax(-1)
    assert token.logprob == pytest.approx(float(expected[1]))
    assert token.alternatives == (
        (1, pytest.approx(float(expected[1]))),
        (3, pytest.approx(float(expected[3]))),
    )
    assert Sampler(Sampling(1, logprobs=0), CPU).sample(LOGITS).alternatives == ()
    assert len(Sampler(Sampling(1, logprobs=20), CPU).sample(LOGITS).alternatives) == 5
    assert Sampler(Sampling(1), CPU).sample(LOGITS).logprob is None

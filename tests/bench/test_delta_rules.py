"""The part of the kernels' check that needs no GPU."""

from __future__ import annotations

import math
import sys

import pytest
import torch

from gearshift.bench.delta_rules import Case, cases, main, naive_twin, relative_error
from gearshift.errors import GearshiftError


def test_cases_cover_both_rules_and_lengths_on_and_off_the_chunks():
    every = list(cases())
    assert len(set(every)) == len(every)
    for mixer in ("gdn", "kda"):
        mine = [case for case in every if case.mixer == mixer]
        assert {case.tokens % 64 == 0 for case in mine} == {True, False}
        assert {(case.heads, case.head_dim) for case in mine} == {(8, 64), (32, 128)}
        assert any(case.timed for case in mine)
    assert Case(True, 64, 8, 64).mixer == "kda"


def test_relative_error_is_that_of_the_norms():
    reference = torch.tensor([3.0, 4.0], dtype=torch.float64)
    assert relative_error(torch.tensor([3.0, 4.0]), reference) == 0
    assert relative_error(torch.tensor([3.0, 4.5]), reference) == pytest.approx(0.1)
    assert relative_error(torch.zeros(2), reference) == pytest.approx(1)


def test_one_nan_makes_the_error_nan_and_so_fails():
    reference = torch.ones(3, dtype=torch.float64)
    error = relative_error(torch.tensor([1.0, float("nan"), 1.0]), reference)
    assert math.isnan(error)
    assert not error < 1e-2


@pytest.mark.parametrize("per_channel", [False, True])
def test_the_twin_takes_both_kinds_of_decay(per_channel: bool):
    q, k, v = (torch.randn(1, 70, 2, 4, dtype=torch.float64) for _ in range(3))
    g = -torch.rand(1, 70, 2, *((4,) if per_channel else ()), dtype=torch.float64)
    beta, state = torch.rand(1, 70, 2, dtype=torch.float64), torch.zeros(1, 2, 4, 4, dtype=torch.float64)
    out, last = naive_twin(q, k, v, g, beta, state)
    assert (out.shape, last.shape) == (v.shape, state.shape)


@pytest.mark.skipif(torch.cuda.is_available(), reason="says what is missing where there is no GPU")
def test_without_a_gpu_it_says_what_it_needs(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(sys, "argv", ["delta_rules", "--out", "never.json"])
    with pytest.raises(GearshiftError, match="needs a CUDA GPU and flash-linear-attention"):
        main()

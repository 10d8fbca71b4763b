"""The gated norm against its formula."""

from __future__ import annotations

import pytest
import torch

from gearshift.supernet.ops.gated_norm import GatedRMSNorm
from tests.supernet.tools import relative_error


@pytest.mark.parametrize("activation", ["silu", "sigmoid"])
def test_formula(activation: str) -> None:
    generator = torch.Generator().manual_seed(0)
    o, gate = (torch.randn(2, 5, 3, 8, generator=generator) for _ in range(2))
    norm = GatedRMSNorm(8, 1e-3, activation)
    norm.weight.data = torch.randn(8, generator=generator)
    wide, z = o.double(), gate.double()
    opened = 1 / (1 + torch.exp(-z)) * (z if activation == "silu" else 1)
    mean_square = (wide * wide).sum(-1, keepdim=True) / 8
    expected = wide / torch.sqrt(mean_square + 1e-3) * norm.weight.double() * opened
    assert relative_error(norm(o, gate), expected) < 1e-6


def test_low_precision_in_and_out_float32_inside() -> None:
    generator = torch.Generator().manual_seed(1)
    o, gate = (torch.randn(2, 5, 3, 8, generator=generator).bfloat16() for _ in range(2))
    norm = GatedRMSNorm(8, 1e-6, "silu")
    assert torch.equal(norm(o, gate), norm(o.float(), gate.float()).bfloat16())
    assert norm(o, gate).dtype == torch.bfloat16

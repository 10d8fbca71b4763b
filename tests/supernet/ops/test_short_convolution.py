"""The short convolution against torch's own depthwise convolution, with states and padded rows."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from gearshift.supernet.ops.short_convolution import short_convolution
from tests.supernet.tools import relative_error

CHANNELS = 6


def random_inputs(seed: int, length: int, taps: int) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(3, length, CHANNELS, generator=generator)
    weight = torch.randn(CHANNELS, taps, generator=generator)
    state = torch.randn(3, taps - 1, CHANNELS, generator=generator)
    return x, weight, state


def depthwise(x: Tensor, weight: Tensor, state: Tensor, bias: Tensor | None = None) -> Tensor:
    convolution = nn.Conv1d(CHANNELS, CHANNELS, weight.shape[1], groups=CHANNELS, bias=bias is not None)
    convolution.weight = nn.Parameter(weight[:, None].detach())
    convolution.bias = None if bias is None else nn.Parameter(bias)
    history = torch.cat([state, x], dim=1).transpose(1, 2)
    return functional.silu(convolution(history)).transpose(1, 2)


@pytest.mark.parametrize("taps", [1, 2, 4])
@pytest.mark.parametrize("length", [1, 2, 9])
@pytest.mark.parametrize("with_state", [False, True])
def test_equals_a_depthwise_convolution(length: int, taps: int, with_state: bool) -> None:
    x, weight, state = random_inputs(length + 10 * taps, length, taps)
    state = state if with_state else torch.zeros_like(state)
    out, next_state = short_convolution(x, weight, state if with_state else None)
    assert relative_error(out, depthwise(x, weight, state)) < 1e-6
    assert torch.equal(next_state, torch.cat([state, x], dim=1)[:, length:])


@pytest.mark.parametrize("length", [1, 2, 9])
@pytest.mark.parametrize("with_state", [False, True])
def test_a_bias_is_that_of_a_depthwise_convolution(length: int, with_state: bool) -> None:
    x, weight, state = random_inputs(length, length, 4)
    bias = torch.linspace(-2, 3, CHANNELS)
    state = state if with_state else torch.zeros_like(state)
    out, next_state = short_convolution(x, weight, state if with_state else None, bias_C=bias)
    assert relative_error(out, depthwise(x, weight, state, bias)) < 1e-6
    assert torch.equal(next_state, torch.cat([state, x], dim=1)[:, length:])


def test_without_an_activation() -> None:
    x, weight, state = random_inputs(3, 9, 4)
    linear, _ = short_convolution(x, weight, state, activation="none")
    assert relative_error(functional.silu(linear), short_convolution(x, weight, state)[0]) < 1e-6
    assert (
        relative_error(short_convolution(2 * x, weight, 2 * state, activation="none")[0], 2 * linear) < 1e-6
    )


def test_gradients() -> None:
    x, weight, state = (t.double().requires_grad_() for t in random_inputs(0, 5, 3))
    assert torch.autograd.gradcheck(lambda *inputs: short_convolution(*inputs), (x, weight, state))


@pytest.mark.parametrize("with_state", [False, True])
def test_each_row_keeps_the_inputs_before_its_own_end(with_state: bool) -> None:
    x, weight, state = random_inputs(7, 6, 4)
    lengths = torch.tensor([6, 2, 0])
    given = state if with_state else None
    out, next_state = short_convolution(x, weight, given, lengths)
    for row, length in enumerate(lengths.tolist()):
        own_state = None if given is None else given[row : row + 1]
        own = x[row : row + 1, :length]
        expected, expected_state = short_convolution(own, weight, own_state)
        assert torch.equal(next_state[row : row + 1], expected_state)
        if length:
            assert relative_error(out[row : row + 1, :length], expected) < 1e-6


def test_two_calls_are_one() -> None:
    x, weight, state = random_inputs(8, 7, 4)
    whole, end = short_convolution(x, weight, state)
    first, middle = short_convolution(x[:, :2], weight, state)
    second, last = short_convolution(x[:, 2:], weight, middle)
    assert relative_error(torch.cat([first, second], dim=1), whole) < 1e-6
    assert torch.equal(last, end)


def test_mixed_precision_gives_the_dtype_of_the_inputs() -> None:
    x, weight, state = random_inputs(5, 9, 4)
    out, next_state = short_convolution(x.bfloat16(), weight, state)
    assert out.dtype == next_state.dtype == torch.bfloat16
    # Only the inputs and the result are rounded, not what lies between.
    exact, _ = short_convolution(x.bfloat16().float(), weight, state.bfloat16().float())
    assert torch.equal(out, exact.bfloat16())

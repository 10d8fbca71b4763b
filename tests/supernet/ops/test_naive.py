"""Both naive twins against a float64 recurrence written here from the equations, forward and backward."""

from __future__ import annotations

import functools
import zlib
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from gearshift.supernet.ops.naive import SPLIT_RANGE, chunk_delta_rule, recurrent_delta_rule
from tests.supernet.tools import relative_error

BATCH, KEY_HEADS, HEADS, KEY_DIM, VALUE_DIM = 2, 2, 4, 16, 12
LENGTHS = (1, 5, 31, 64, 65, 130)
# Log decay of a token: none; a whole chunk within the split form's range; near its end; far beyond it.
DECAYS = {"none": 0.0, "mild": 0.1, "near the split": 1.9 * SPLIT_RANGE / 64, "strong": 12.0}
INPUTS = ("q", "k", "v", "g", "beta", "state")

Form = Callable[..., tuple[Tensor, Tensor]]
FORMS: dict[str, Form] = {
    "recurrent": recurrent_delta_rule,
    **{f"chunk {size}": functools.partial(chunk_delta_rule, chunk_size=size) for size in (16, 32, 64)},
}


def equation(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, state: Tensor
) -> tuple[Tensor, Tensor]:
    """S = (I - b k k^T) Diag(a) S + b k v^T and o = S^T q, token by token, in float64, as in the papers."""
    group = v.shape[2] // q.shape[2]
    head_to_key_head = [head // group for head in range(v.shape[2])]
    q = (q / torch.sqrt((q * q).sum(-1, keepdim=True) + 1e-6) / q.shape[-1] ** 0.5)[:, :, head_to_key_head]
    k = (k / torch.sqrt((k * k).sum(-1, keepdim=True) + 1e-6))[:, :, head_to_key_head]
    a = g.exp() if g.dim() == 4 else g.exp()[..., None].expand_as(k)
    identity = torch.eye(q.shape[3], dtype=torch.float64)
    outputs = []
    for t in range(v.shape[1]):
        strength = beta[:, t, :, None, None]
        erase = identity - strength * torch.einsum("bhi,bhj->bhij", k[:, t], k[:, t])
        state = erase @ torch.diag_embed(a[:, t]) @ state + strength * torch.einsum(
            "bhk,bhv->bhkv", k[:, t], v[:, t]
        )
        outputs.append(torch.einsum("bhkv,bhk->bhv", state, q[:, t]))
    return torch.stack(outputs, dim=1), state


def make_inputs(seed: int, length: int, per_channel: bool, decay: float) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    heads = BATCH, length, HEADS
    g = -decay * torch.rand(*heads, *([KEY_DIM] if per_channel else []), generator=generator)
    return (
        normal(BATCH, length, KEY_HEADS, KEY_DIM),
        normal(BATCH, length, KEY_HEADS, KEY_DIM),
        normal(*heads, VALUE_DIM),
        g,
        torch.rand(*heads, generator=generator),
        normal(BATCH, HEADS, KEY_DIM, VALUE_DIM),
    )


def run(form: Form, inputs: tuple[Tensor, ...]) -> tuple[Tensor, Tensor, tuple[Tensor, ...]]:
    """Output, last state, and the gradients of a random weighting of both."""
    leaves = [x.detach().clone().requires_grad_() for x in inputs]
    out, state = form(*leaves)
    generator = torch.Generator().manual_seed(out.shape[1])
    weights = [torch.randn(x.shape, generator=generator).to(x.dtype) for x in (out, state)]
    gradients = torch.autograd.grad([out, state], leaves, weights)
    return out.detach(), state.detach(), gradients


@functools.cache
def case(length: int, per_channel: bool, decay: str) -> tuple[tuple[Tensor, ...], tuple]:
    seed = zlib.crc32(f"{length} {per_channel} {decay}".encode())
    inputs = make_inputs(seed, length, per_channel, DECAYS[decay])
    return inputs, run(equation, tuple(x.double() for x in inputs))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("decay", DECAYS)
@pytest.mark.parametrize("per_channel", [False, True], ids=["scalar", "channel"])
@pytest.mark.parametrize("length", LENGTHS)
def test_twin_is_the_equation(length: int, per_channel: bool, decay: str, form: str) -> None:
    inputs, (expected_out, expected_state, expected_gradients) = case(length, per_channel, decay)
    out, state, gradients = run(FORMS[form], inputs)
    assert relative_error(out, expected_out) < 1e-5
    assert relative_error(state, expected_state) < 1e-5
    for name, gradient, expected in zip(INPUTS, gradients, expected_gradients, strict=True):
        assert relative_error(gradient, expected) < 1e-4, name


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("fall", [100, 1000])
@pytest.mark.parametrize("per_channel", [False, True], ids=["scalar", "channel"])
def test_one_forgetful_token_among_mild_ones(per_channel: bool, fall: int, form: str) -> None:
    """Later decays are differences of sums that hold the fall: float32 leaves them an error in proportion."""
    q, k, v, g, beta, state = make_inputs(5, 40, per_channel, 0.1)
    g[:, 7] -= fall
    inputs = (q, k, v, g, beta, state)
    *expected, expected_gradients = run(equation, tuple(x.double() for x in inputs))
    *given, gradients = run(FORMS[form], inputs)
    bound = max(1e-5, torch.finfo(torch.float32).eps * fall)
    for tensor, wanted in zip(given, expected, strict=True):
        assert relative_error(tensor, wanted) < bound
    for name, gradient, wanted in zip(INPUTS, gradients, expected_gradients, strict=True):
        assert relative_error(gradient, wanted) < 10 * bound, name


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("per_channel", [False, True], ids=["scalar", "channel"])
def test_no_state_means_zeros(per_channel: bool, form: str) -> None:
    *inputs, state = make_inputs(1, 37, per_channel, 0.5)
    out, last = FORMS[form](*inputs, None)
    expected_out, expected_last = FORMS[form](*inputs, torch.zeros_like(state))
    assert torch.equal(out, expected_out)
    assert torch.equal(last, expected_last)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("per_channel", [False, True], ids=["scalar", "channel"])
def test_two_calls_are_one(per_channel: bool, form: str) -> None:
    *inputs, state = make_inputs(2, 75, per_channel, 0.5)
    out, last = FORMS[form](*inputs, state)
    first, middle = FORMS[form](*(x[:, :41] for x in inputs), state)
    second, end = FORMS[form](*(x[:, 41:] for x in inputs), middle)
    assert relative_error(torch.cat([first, second], dim=1), out) < 1e-5
    assert relative_error(end, last) < 1e-5


@pytest.mark.parametrize("form", FORMS)
def test_low_precision_is_computed_in_float32(form: str) -> None:
    inputs = [x.bfloat16() for x in make_inputs(3, 33, True, 0.5)]
    out, state = FORMS[form](*inputs)
    expected, expected_state = FORMS[form](*(x.float() for x in inputs))
    assert out.dtype == torch.bfloat16
    assert state.dtype == torch.float32
    assert torch.equal(out, expected.bfloat16())
    assert torch.equal(state, expected_state)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("per_channel", [False, True], ids=["scalar", "channel"])
def test_decays_beyond_float32_give_zeros_and_no_nan(per_channel: bool, form: str) -> None:
    inputs = make_inputs(4, 40, per_channel, 1e4)
    out, state, gradients = run(FORMS[form], inputs)
    for tensor in (out, state, *gradients):
        assert tensor.isfinite().all()

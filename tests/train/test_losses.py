"""Distances of mixer outputs against a slow float64 reference."""

from __future__ import annotations

import pytest
import torch

from gearshift.train import losses
from gearshift.train.losses import activation_matching, distance, token_weights
from tests.train.tools import grad

FORMS = ("relative", "norm", "squared", "relative_squared")
MASK = torch.tensor([[True, False, True, True, False], [False, True, True, True, True]])


def made(*shape, seed=0, scale=1.0, dtype=torch.float32):
    return (
        torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        .mul(scale)
        .to(dtype)
    )


def reference(student, teacher, form, mask):
    """Token by token, with Python's own arithmetic, and its gradient by autograd in float64."""
    student = student.double().requires_grad_()
    total, count = student.new_zeros(()), 0
    for row in range(student.shape[0]):
        for token in range(student.shape[1]):
            if mask is not None and not mask[row, token]:
                continue
            difference = student[row, token] - teacher.double()[row, token]
            size = sum(x**2 for x in teacher.double()[row, token].tolist())
            square = sum(x**2 for x in difference)
            value = square if form.endswith("squared") else square**0.5
            if form.startswith("relative"):
                value = value / (size if form.endswith("squared") else size**0.5)
            total, count = total + value, count + 1
    loss = total / max(count, 1)
    loss.backward()
    return loss.item(), grad(student)


@pytest.mark.parametrize("mask", [None, MASK], ids=["all", "masked"])
@pytest.mark.parametrize("form", FORMS)
def test_distance_and_gradient_equal_a_slow_reference(form, mask, monkeypatch):
    monkeypatch.setattr(losses, "CHUNK_TOKENS", 3)
    student, teacher = made(2, 5, 8), made(2, 5, 8, seed=1, scale=3.0)
    expected, gradient = reference(student, teacher, form, mask)
    student.requires_grad_()
    value = distance(student, teacher, token_weights(mask, student.flatten(0, 1)), form)
    value.backward()
    assert value.item() == pytest.approx(expected, rel=1e-5)
    assert (grad(student).double() - gradient).norm() < 1e-5 * gradient.norm()


@pytest.mark.parametrize("form", FORMS)
def test_a_given_number_of_tokens_is_divided_by(form):
    student, teacher = made(2, 5, 8), made(2, 5, 8, seed=1)
    weight_N = token_weights(MASK, student.flatten(0, 1), total=70)
    whole = distance(student, teacher, token_weights(MASK, student.flatten(0, 1)), form)
    assert distance(student, teacher, weight_N, form).item() == pytest.approx(whole.item() * 7 / 70, rel=1e-5)


def test_matching_is_the_mean_over_layers_of_any_size():
    quiet, loud = made(1, 4, 8), made(1, 4, 8) * 1000
    assert activation_matching([0.5 * quiet], [quiet]).item() == pytest.approx(0.5, rel=1e-5)
    assert activation_matching([0 * quiet, 0.5 * loud], [quiet, loud]).item() == pytest.approx(0.75, rel=1e-5)
    assert activation_matching([], []).item() == 0


def test_tokens_that_do_not_count_may_hold_anything():
    student, teacher = made(2, 5, 8), made(2, 5, 8, seed=1)
    weight_N = token_weights(MASK, student.flatten(0, 1))
    expected = distance(student, teacher, weight_N)
    student[~MASK] = float("nan")
    student.requires_grad_()
    value = distance(student, teacher, weight_N)
    value.backward()
    assert torch.equal(value, expected)
    assert (grad(student)[~MASK] == 0).all()
    assert grad(student)[MASK].isfinite().all()


@pytest.mark.parametrize("form", FORMS)
def test_there_is_a_gradient_where_the_distance_is_zero(form):
    teacher = made(1, 4, 8)
    student = teacher.clone().requires_grad_()
    activation_matching([student], [teacher], form=form).backward()
    assert (grad(student) == 0).all()


def test_no_gradient_reaches_the_teacher():
    student, teacher = made(2, 5, 8).requires_grad_(), made(2, 5, 8, seed=1).requires_grad_()
    activation_matching([student], [teacher]).backward()
    assert teacher.grad is None
    assert student.grad is not None


def test_bfloat16_outputs_are_compared_in_float32():
    student, teacher = made(2, 5, 64, dtype=torch.bfloat16), made(2, 5, 64, seed=1, dtype=torch.bfloat16)
    expected, _ = reference(student.detach(), teacher, "relative", None)
    value = activation_matching([student.requires_grad_()], [teacher])
    value.backward()
    assert value.dtype == torch.float32
    assert grad(student).dtype == torch.bfloat16
    assert value.item() == pytest.approx(expected, rel=1e-5)


def test_nothing_counted_is_zero():
    student = made(2, 5, 8).requires_grad_()
    none = token_weights(torch.zeros(2, 5).bool(), student.flatten(0, 1))
    assert distance(student, made(2, 5, 8, seed=1), none).item() == 0

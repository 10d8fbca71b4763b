from __future__ import annotations

import pytest
import torch
from torch import Tensor

from gearshift.train import losses
from gearshift.train.losses import TeacherDistribution, activation_matching, forward_kl


def reference_kl(student: Tensor, teacher: Tensor, mask: Tensor | None) -> float:
    """Token by token and word by word in float64."""
    values = []
    for s_row, t_row, counted in zip(
        student.double().flatten(0, -2),
        teacher.double().flatten(0, -2),
        torch.ones(student.shape[:-1]).flatten() if mask is None else mask.flatten(),
        strict=True,
    ):
        if counted:
            p = t_row.exp() / t_row.exp().sum()
            q = s_row.exp() / s_row.exp().sum()
            values.append(sum((p_i * (p_i / q_i).log()).item() for p_i, q_i in zip(p, q, strict=True)))
    return sum(values) / len(values)


def reference_matching(student: list[Tensor], teacher: list[Tensor], mask: Tensor | None) -> float:
    values = []
    for s_layer, t_layer in zip(student, teacher, strict=True):
        for b in range(s_layer.shape[0]):
            for t in range(s_layer.shape[1]):
                if mask is None or mask[b, t]:
                    s, r = s_layer[b, t].double(), t_layer[b, t].double()
                    values.append(((s - r).square().sum().sqrt() / r.square().sum().sqrt()).item())
    return sum(values) / len(values)


def logits(*shape: int, seed: int = 0, scale: float = 3.0, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(*shape, generator=generator) * scale).to(dtype)


MASK = torch.tensor([[1, 1, 0, 1, 0], [0, 1, 1, 1, 1]]).bool()


@pytest.mark.parametrize("mask", [None, MASK])
@pytest.mark.parametrize("chunk", [1, 3, 1024])
def test_forward_kl_matches_reference(mask, chunk, monkeypatch):
    monkeypatch.setattr(losses, "CHUNK_TOKENS", chunk)
    student, teacher = logits(2, 5, 11), logits(2, 5, 11, seed=1)
    assert forward_kl(student, teacher, mask).item() == pytest.approx(
        reference_kl(student, teacher, mask), rel=1e-5
    )


def test_forward_kl_is_small_and_precise_near_the_teacher():
    teacher = logits(1, 64, 50)
    student = teacher + logits(1, 64, 50, seed=1, scale=0.05)
    assert forward_kl(student, teacher).item() == pytest.approx(
        reference_kl(student, teacher, None), rel=1e-3
    )
    assert forward_kl(teacher, teacher).abs().item() < 1e-6


def test_forward_kl_points_from_teacher_to_student():
    """KL(teacher || student) punishes a student that gives no chance to what the teacher says."""
    certain, open_minded = torch.tensor([[0.0, -20.0]]), torch.tensor([[0.0, 0.0]])
    assert forward_kl(open_minded, certain).item() == pytest.approx(0.6931, abs=1e-3)
    assert forward_kl(certain, open_minded).item() > 9


@pytest.mark.parametrize("mask", [None, MASK])
def test_forward_kl_gradient(mask, monkeypatch):
    monkeypatch.setattr(losses, "CHUNK_TOKENS", 4)
    student = logits(2, 5, 7, dtype=torch.float64).requires_grad_()
    teacher = logits(2, 5, 7, seed=1, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda s: 2.5 * forward_kl(s, teacher, mask), (student,))


def test_forward_kl_gradient_in_float32_matches_float64():
    teacher, values = logits(3, 40, seed=1), logits(3, 40)
    gradients = []
    for dtype in (torch.float32, torch.float64):
        student = values.to(dtype, copy=True).requires_grad_()
        forward_kl(student, teacher.to(dtype)).backward()
        gradients.append(student.grad)
    torch.testing.assert_close(gradients[0].double(), gradients[1], rtol=1e-5, atol=1e-7)


def test_a_prepared_teacher_gives_the_same_bits():
    student, teacher = logits(2, 5, 11), logits(2, 5, 11, seed=1)
    assert torch.equal(forward_kl(student, teacher), forward_kl(student, TeacherDistribution.of(teacher)))


def test_no_gradient_reaches_the_teacher():
    teacher = logits(2, 5, 11).requires_grad_()
    student = logits(2, 5, 11, seed=1).requires_grad_()
    forward_kl(student, teacher).backward()
    activation_matching([student], [teacher]).backward()
    assert teacher.grad is None
    assert student.grad is not None


def test_masked_tokens_may_hold_anything():
    student, teacher = logits(2, 5, 11), logits(2, 5, 11, seed=1)
    expected = forward_kl(student, teacher, MASK)
    student[~MASK] = float("nan")
    student.requires_grad_()
    loss = forward_kl(student, teacher, MASK)
    loss.backward()
    assert torch.equal(loss, expected)
    assert student.grad is not None
    assert student.grad.isfinite().all()
    assert (student.grad[~MASK] == 0).all()


def test_nothing_counted_is_zero():
    assert forward_kl(logits(2, 5, 11), logits(2, 5, 11), torch.zeros(2, 5).bool()).item() == 0


def test_bfloat16_logits_are_computed_in_float32():
    student, teacher = (
        logits(2, 5, 300, dtype=torch.bfloat16),
        logits(2, 5, 300, seed=1, dtype=torch.bfloat16),
    )
    student.requires_grad_()
    loss = forward_kl(student, teacher)
    loss.backward()
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(reference_kl(student, teacher, None), rel=1e-5)
    assert student.grad is not None
    assert student.grad.dtype == torch.bfloat16


@pytest.mark.parametrize("mask", [None, MASK])
def test_activation_matching_matches_reference(mask):
    student = [logits(2, 5, 8, seed=s) for s in range(3)]
    teacher = [logits(2, 5, 8, seed=s + 10, scale=10.0 ** (s - 1)) for s in range(3)]
    value = activation_matching(student, teacher, mask).item()
    assert value == pytest.approx(reference_matching(student, teacher, mask), rel=1e-5)


def test_activation_matching_weighs_layers_alike_whatever_their_size():
    quiet, loud = logits(1, 4, 8), logits(1, 4, 8) * 1000
    assert activation_matching([0.5 * quiet], [quiet]).item() == pytest.approx(0.5, rel=1e-5)
    assert activation_matching([0.5 * loud], [loud]).item() == pytest.approx(0.5, rel=1e-5)
    assert activation_matching([0 * quiet, 0 * loud], [quiet, loud]).item() == pytest.approx(1.0, rel=1e-5)


@pytest.mark.parametrize("mask", [None, MASK])
def test_activation_matching_gradient(mask):
    student = [logits(2, 5, 6, seed=s, dtype=torch.float64).requires_grad_() for s in range(2)]
    teacher = [logits(2, 5, 6, seed=s + 10, dtype=torch.float64) for s in range(2)]
    assert torch.autograd.gradcheck(lambda *s: activation_matching(s, teacher, mask), tuple(student))


def test_activation_matching_has_a_gradient_where_it_is_zero():
    teacher = logits(1, 4, 8)
    student = teacher.clone().requires_grad_()
    activation_matching([student], [teacher]).backward()
    assert student.grad is not None
    assert student.grad.isfinite().all()


def test_activation_matching_of_no_layer_is_zero():
    assert activation_matching([], []).item() == 0

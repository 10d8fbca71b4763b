"""Losses of the next token against a slow float64 reference, and their memory."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace

import pytest
import torch

from gearshift.train.head_losses import FullTeacher, HeadWeights, TopKTeacher, head_losses
from gearshift.train.losses import token_weights
from tests.train.tools import grad

N, D, V = 11, 6, 19
MASK = torch.tensor([True, True, False, True, True, False, True, True, True, False, True])
ALL = HeadWeights(forward_kl=0.7, reverse_kl=0.4, cross_entropy=0.3, temperature=1.0)
CASES = {
    "forward": HeadWeights(forward_kl=1.0),
    "reverse": HeadWeights(reverse_kl=1.0),
    "cross entropy": HeadWeights(cross_entropy=1.0),
    "all": ALL,
    "all, warm": replace(ALL, temperature=2.5),
    "all, cold": replace(ALL, temperature=0.6),
}


def made(*shape, seed=0, scale=1.0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * scale


HIDDEN, HEAD = made(N, D, scale=2.0), made(V, D, seed=1)
TEACHER_HIDDEN, TEACHER_HEAD = made(N, D, seed=2, scale=2.0), made(V, D, seed=3)
TARGETS = torch.randint(0, V, (N,), generator=torch.Generator().manual_seed(4))


def reference(weights, mask, hidden=HIDDEN, head=HEAD, teacher_log_probabilities=None):
    """Token by token in float64; gradients by autograd."""
    hidden, head = hidden.double().requires_grad_(), head.double().requires_grad_()
    t, terms, count = weights.temperature, list(torch.zeros(3).double()), 0
    for n in range(N):
        if not mask[n]:
            continue
        z = hidden[n] @ head.T
        log_q = z / t - torch.logsumexp(z / t, 0)
        if teacher_log_probabilities is None:
            y = TEACHER_HIDDEN[n].double() @ TEACHER_HEAD.double().T
            log_p = y / t - torch.logsumexp(y / t, 0)
        else:
            log_p, log_q = teacher_log_probabilities(n, log_q)
        terms[0] = terms[0] + (log_p.exp() * (log_p - log_q)).sum() * t**2
        terms[1] = terms[1] + (log_q.exp() * (log_q - log_p)).sum() * t**2
        terms[2] = terms[2] - (z[TARGETS[n]] - torch.logsumexp(z, 0))
        count += 1
    factors = (weights.forward_kl, weights.reverse_kl, weights.cross_entropy)
    loss = torch.stack([f * term for f, term in zip(factors, terms, strict=True)]).sum() / count
    loss.backward()
    values = [float(term.detach()) / count if f else 0.0 for f, term in zip(factors, terms, strict=True)]
    return loss.item(), values, grad(hidden), grad(head)


def close(given, expected):
    return (given.double() - expected).norm() < 1e-5 * expected.norm()


@pytest.mark.parametrize("chunk", [4, 100])
@pytest.mark.parametrize("mask", [torch.ones(N).bool(), MASK], ids=["every token", "masked"])
@pytest.mark.parametrize("weights", CASES.values(), ids=CASES)
def test_losses_and_gradients_equal_a_slow_reference(weights, mask, chunk):
    expected, terms, of_hidden, of_head = reference(weights, mask)
    hidden, head = HIDDEN.clone().requires_grad_(), HEAD.clone().requires_grad_()
    loss, given = head_losses(
        hidden,
        head,
        weights,
        token_weights(mask, hidden),
        teacher=FullTeacher(TEACHER_HIDDEN, TEACHER_HEAD),
        targets_N=TARGETS,
        chunk=chunk,
    )
    (3 * loss).backward()
    assert loss.item() == pytest.approx(expected, rel=1e-5)
    assert given.tolist() == pytest.approx(terms, rel=1e-5)
    assert close(grad(hidden) / 3, of_hidden)
    assert close(grad(head) / 3, of_head)


@pytest.mark.parametrize("weights", [CASES["forward"], CASES["reverse"]], ids=["forward", "reverse"])
def test_likeliest_tokens_and_the_rest_as_one_equal_a_slow_reference(weights):
    """The reference has k + 1 outcomes; the code spreads the last one over all other tokens."""
    log_p_NV = torch.log_softmax(TEACHER_HIDDEN.double() @ TEACHER_HEAD.double().T, -1)
    best = log_p_NV.topk(5, -1)

    def outcomes(n, log_q):
        outside = torch.ones(V).bool()
        outside[best.indices[n]] = False
        rest_p = log_p_NV[n][outside].exp().sum().log()
        rest_q = log_q[outside].exp().sum().log()
        return torch.cat([best.values[n], rest_p[None]]), torch.cat([log_q[best.indices[n]], rest_q[None]])

    expected, _, of_hidden, _ = reference(weights, MASK, teacher_log_probabilities=outcomes)
    hidden = HIDDEN.clone().requires_grad_()
    teacher = TopKTeacher(best.indices.int(), best.values.float())
    loss, _ = head_losses(hidden, HEAD, weights, token_weights(MASK, hidden), teacher=teacher, chunk=4)
    loss.backward()
    assert loss.item() == pytest.approx(expected, rel=1e-5)
    assert close(grad(hidden), of_hidden)


def test_tokens_that_do_not_count_may_hold_anything():
    weight_N = token_weights(MASK, HIDDEN)
    teacher = FullTeacher(TEACHER_HIDDEN, TEACHER_HEAD)
    expected, _ = head_losses(HIDDEN, HEAD, ALL, weight_N, teacher=teacher, targets_N=TARGETS, chunk=4)
    hidden, targets = HIDDEN.clone(), TARGETS.clone()
    hidden[~MASK], targets[~MASK] = float("nan"), -100
    hidden.requires_grad_()
    head = HEAD.clone().requires_grad_()
    loss, _ = head_losses(hidden, head, ALL, weight_N, teacher=teacher, targets_N=targets, chunk=4)
    loss.backward()
    assert torch.equal(loss, expected)
    assert (grad(hidden)[~MASK] == 0).all()
    assert grad(hidden).isfinite().all()
    assert grad(head).isfinite().all()


def test_a_student_that_is_its_teacher_has_no_divergence():
    hidden = TEACHER_HIDDEN.clone().requires_grad_()
    weights = HeadWeights(forward_kl=1.0, reverse_kl=1.0)
    loss, _ = head_losses(
        hidden,
        TEACHER_HEAD,
        weights,
        token_weights(None, hidden),
        teacher=FullTeacher(TEACHER_HIDDEN, TEACHER_HEAD),
    )
    loss.backward()
    assert abs(loss.item()) < 1e-6
    assert grad(hidden).abs().max() < 1e-6


def test_forward_kl_points_from_teacher_to_student():
    """KL(teacher || student) punishes a student that gives no chance to what the teacher says."""
    certain, open_minded, head = torch.tensor([[10.0]]), torch.tensor([[0.0]]), torch.tensor([[1.0], [-1.0]])

    def value(student, teacher, **weights):
        one = torch.ones(1)
        return head_losses(student, head, HeadWeights(**weights), one, teacher=FullTeacher(teacher, head))[0]

    assert value(open_minded, certain, forward_kl=1.0).item() == pytest.approx(0.6931, abs=1e-3)
    assert value(certain, open_minded, forward_kl=1.0).item() > 9
    assert value(certain, open_minded, reverse_kl=1.0).item() == pytest.approx(0.6931, abs=1e-3)


def test_bfloat16_logits_are_compared_in_float32():
    hidden, head = HIDDEN.bfloat16().requires_grad_(), HEAD.bfloat16()
    loss, _ = head_losses(
        hidden, head, CASES["cross entropy"], token_weights(None, hidden), targets_N=TARGETS
    )
    loss.backward()
    logits = (hidden.detach() @ head.T).double()
    expected = torch.nn.functional.cross_entropy(logits, TARGETS).item()
    assert loss.item() == pytest.approx(expected, rel=1e-5)
    assert grad(hidden).dtype == torch.bfloat16


MEASURE = """
import resource, sys, torch
from gearshift.train.head_losses import FullTeacher, HeadWeights, head_losses
tokens, size, vocabulary = 4096, 32, int(sys.argv[1])
hidden = torch.randn(tokens, size, requires_grad=True)
head, teacher = torch.randn(vocabulary, size), torch.randn(tokens, size)
weights = HeadWeights(forward_kl=1.0, reverse_kl=1.0, cross_entropy=1.0)
targets, weight = torch.zeros(tokens, dtype=torch.long), torch.full((tokens,), 1 / tokens)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
full = FullTeacher(teacher, head)
loss, _ = head_losses(hidden, head, weights, weight, teacher=full, targets_N=targets, chunk=16)
loss.backward()
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


def test_memory_is_that_of_a_chunk_and_not_of_all_logits():
    """The logits of all tokens would take 1.07 GB, once; all work on a chunk takes a few of its 4 MB."""
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, str(65536)], capture_output=True, text=True, check=True
    )
    assert int(done.stdout) * 1024 < 0.1 * 4096 * 65536 * 4

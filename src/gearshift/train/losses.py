"""What distillation minimises: the teacher's next-token distribution, and the outputs of its mixers.

Shape letters: B batch, T tokens, V vocabulary, D hidden size, L layers, N tokens of all sequences together.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

# Rows of float32 work space at a time: (tokens, vocabulary) temporaries never grow with the batch.
CHUNK_TOKENS = 1024
# Smallest teacher norm that a distance is divided by; real mixer outputs are far larger.
SMALLEST_NORM = 1e-6


@dataclass(frozen=True)
class TeacherDistribution:
    """The teacher's next-token distributions, computed once for all the placements compared to it.

    Attributes:
        probabilities_NV: softmax of the teacher's logits, float32 (float64 for float64 logits).
        entropy_N: entropy of each row in nats.
    """

    probabilities_NV: Tensor
    entropy_N: Tensor

    @classmethod
    def of(cls, logits: Tensor) -> Self:
        """Compute the distributions from logits (..., V); no gradient flows to the teacher."""
        log_probabilities_NV = torch.log_softmax(_upcast(logits.detach().flatten(0, -2)), dim=-1)
        probabilities_NV = log_probabilities_NV.exp()
        return cls(probabilities_NV, -torch.linalg.vecdot(probabilities_NV, log_probabilities_NV))


def forward_kl(
    student_logits: Tensor, teacher: Tensor | TeacherDistribution, mask: Tensor | None = None
) -> Tensor:
    """KL(teacher || student) of the next token, mean over the counted tokens, in nats.

    Computed in float32 (float64 for float64 logits) chunk by chunk over tokens. The gradient with respect to
    the student's logits, (student's probabilities - teacher's) / count, is computed along with the loss, so
    that no log-probabilities are kept for the backward pass.

    Args:
        student_logits: (..., V).
        teacher: the teacher's logits of the same shape, or what `TeacherDistribution.of` made of them.
        mask: which tokens count, of shape (...), bool; None for all.

    Returns:
        A scalar; 0 if no token counts.
    """
    distribution = teacher if isinstance(teacher, TeacherDistribution) else TeacherDistribution.of(teacher)
    student_NV = student_logits.flatten(0, -2)
    assert student_NV.shape == distribution.probabilities_NV.shape, "student and teacher differ in shape"
    weight_N = _token_weights(mask, student_NV)
    return _ForwardKl.apply(student_NV, distribution.probabilities_NV, distribution.entropy_N, weight_N)


def activation_matching(
    student: Sequence[Tensor], teacher: Sequence[Tensor], mask: Tensor | None = None
) -> Tensor:
    """Mean over layers and counted tokens of ||student - teacher||_2 / ||teacher||_2.

    Super Apriel (arXiv 2604.19877) takes the plain norm ||student - teacher||_2. The norm of mixer outputs
    grows by an order of magnitude from the first layer to the last, and differs between teachers, so the
    plain norm mostly trains the last layers and its weight has to be found anew for every teacher. Divided by
    the teacher's norm, every layer counts the same and the term reads as a relative error: 1 is what an
    output of zero would have.

    Args:
        student: mixer outputs of the layers to match, each (B, T, D).
        teacher: the teacher's outputs of the same layers; no gradient flows to them.
        mask: which tokens count, (B, T) bool; None for all.

    Returns:
        A scalar; 0 if there is no layer or no counted token.
    """
    assert len(student) == len(teacher), "student and teacher differ in layers"
    if not student:
        return torch.zeros(())
    weight_N = _token_weights(mask, student[0].flatten(0, -2))
    layers = [_relative_distance(s, t.detach()) @ weight_N for s, t in zip(student, teacher, strict=True)]
    return torch.stack(layers).mean()


def _relative_distance(student: Tensor, teacher: Tensor) -> Tensor:
    student_ND, teacher_ND = (_upcast(x.flatten(0, -2)) for x in (student, teacher))
    norm_N = torch.linalg.vector_norm(teacher_ND, dim=-1).clamp_min(SMALLEST_NORM)
    return torch.linalg.vector_norm(student_ND - teacher_ND, dim=-1) / norm_N


def _upcast(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _token_weights(mask: Tensor | None, rows_Nx: Tensor) -> Tensor:
    """1 / count for the counted tokens and 0 for the others, shape (N,)."""
    dtype = torch.promote_types(rows_Nx.dtype, torch.float32)
    counted_N = rows_Nx.new_ones(rows_Nx.shape[0], dtype=dtype) if mask is None else mask.flatten().to(dtype)
    return counted_N / counted_N.sum().clamp_min(1)


class _ForwardKl(torch.autograd.Function):
    """Sum over tokens of weight * KL; the gradient is computed along with it in the forward pass."""

    @staticmethod
    def forward(
        ctx: Any,  # noqa: ANN401 - autograd's own context
        student_NV: Tensor,
        probabilities_NV: Tensor,
        entropy_N: Tensor,
        weight_N: Tensor,
    ) -> Tensor:
        gradient_NV = torch.empty_like(student_NV) if ctx.needs_input_grad[0] else None
        loss = weight_N.new_zeros(())
        for start in range(0, student_NV.shape[0], CHUNK_TOKENS):
            rows = slice(start, start + CHUNK_TOKENS)
            log_student = torch.log_softmax(_upcast(student_NV[rows]), dim=-1)
            cross_entropy = -torch.linalg.vecdot(probabilities_NV[rows], log_student)
            # A token that does not count adds exactly 0, whatever its logits are.
            kl = (cross_entropy - entropy_N[rows]).masked_fill(weight_N[rows] == 0, 0.0)
            loss = loss + kl @ weight_N[rows]
            if gradient_NV is not None:
                difference = log_student.exp_().sub_(probabilities_NV[rows]).mul_(weight_N[rows, None])
                gradient_NV[rows] = difference.masked_fill_(weight_N[rows, None] == 0, 0.0)
        ctx.save_for_backward(gradient_NV)
        return loss

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride] - the decorator hides the names
        ctx: Any,  # noqa: ANN401
        upstream: Tensor,
    ) -> tuple[Tensor, None, None, None]:
        (gradient_NV,) = ctx.saved_tensors
        return gradient_NV * upstream.to(gradient_NV.dtype), None, None, None

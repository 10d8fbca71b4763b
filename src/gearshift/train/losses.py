"""How far a student's mixer outputs are from the teacher's, and next-token distributions from logits.

Shape letters: B batch, T tokens, V vocabulary, D hidden size, L layers, N tokens of all sequences together.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, Self

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

# Rows of float32 work space at a time: (tokens, vocabulary) temporaries never grow with the batch.
CHUNK_TOKENS = 1024
# Smallest teacher norm that a distance is divided by; real mixer outputs are far larger.
SMALLEST_NORM = 1e-6

Form = Literal["relative", "norm", "squared", "relative_squared"]


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
        log_probabilities_NV = torch.log_softmax(upcast(logits.detach().flatten(0, -2)), dim=-1)
        probabilities_NV = log_probabilities_NV.exp()
        return cls(probabilities_NV, -torch.linalg.vecdot(probabilities_NV, log_probabilities_NV))


def activation_matching(
    student: Sequence[Tensor],
    teacher: Sequence[Tensor],
    weight_N: Tensor | None = None,
    form: Form = "relative",
) -> Tensor:
    """Mean over layers of :func:`distance`; by default also over tokens.

    Super Apriel (arXiv 2604.19877) takes the plain norm ||student - teacher||_2. The norm of mixer outputs
    grows by an order of magnitude from the first layer to the last, and differs between teachers, so the
    plain norm mostly trains the last layers and its weight has to be found anew for every teacher. Divided by
    the teacher's norm, every layer counts the same and the term reads as a relative error: 1 is what an
    output of zero would have.

    Args:
        student: mixer outputs of the layers to match, each (B, T, D).
        teacher: the teacher's outputs of the same layers; no gradient flows to them.
        weight_N: what each token counts, (N); one divided by their number if None.
        form: how the distance is measured.

    Returns:
        A scalar; 0 if there is no layer.
    """
    assert len(student) == len(teacher), "student and teacher differ in layers"
    if not student:
        return torch.zeros(())
    if weight_N is None:
        weight_N = token_weights(None, student[0].flatten(0, -2))
    return torch.stack([distance(s, t, weight_N, form) for s, t in zip(student, teacher, strict=True)]).mean()


def distance(student: Tensor, teacher: Tensor, weight_N: Tensor, form: Form = "relative") -> Tensor:
    """Weighted sum over tokens of the distance between two outputs of one layer.

    ``norm`` is ||s - t||_2 and ``squared`` its square, summed over channels; ``relative`` and
    ``relative_squared`` are those divided by ||t||_2 and its square. Computed in float32 (float64 for float64
    tensors); the differences are computed again in the backward pass, so that nothing is kept for it but the
    two outputs.

    Args:
        student: (..., D).
        teacher: of the same shape; no gradient flows to it.
        weight_N: what each token counts; tokens of weight 0 may hold anything.
        form: see above.
    """
    assert student.shape == teacher.shape, "student and teacher differ in shape"
    return _Distance.apply(student, teacher.detach(), weight_N, form)


class _Distance(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,  # noqa: ANN401 - autograd's own context
        student: Tensor,
        teacher: Tensor,
        weight_N: Tensor,
        form: Form,
    ) -> Tensor:
        ctx.save_for_backward(student, teacher, weight_N)
        ctx.form = form
        loss = weight_N.new_zeros(())
        for rows in chunks(weight_N.shape[0]):
            difference, scale = _difference(student, teacher, rows, form)
            norm = torch.linalg.vector_norm(difference, dim=-1)
            terms = norm.square() if form.endswith("squared") else norm
            loss = loss + ignore(terms / scale, weight_N[rows]) @ weight_N[rows]
        return loss

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride] - the decorator hides the names
        ctx: Any,  # noqa: ANN401
        upstream: Tensor,
    ) -> tuple[Tensor, None, None, None]:
        student, teacher, weight_N = ctx.saved_tensors
        gradient = torch.empty_like(student)
        flat = gradient.flatten(0, -2)
        for rows in chunks(weight_N.shape[0]):
            difference, scale = _difference(student, teacher, rows, ctx.form)
            if ctx.form.endswith("squared"):
                factor = 2.0 / scale
            else:
                norm = torch.linalg.vector_norm(difference, dim=-1)
                # Where both are equal the norm has a kink; 0 is one of its subgradients.
                factor = torch.where(norm > 0, 1 / (norm * scale), 0.0)
            factor = factor * weight_N[rows] * upstream
            flat[rows] = ignore(difference * factor[:, None], weight_N[rows]).to(student.dtype)
        return gradient, None, None, None


def _difference(student: Tensor, teacher: Tensor, rows: slice, form: Form) -> tuple[Tensor, Tensor]:
    """Student - teacher, and what the distance of each row is divided by."""
    teacher_ND = upcast(teacher.flatten(0, -2)[rows])
    difference = upcast(student.flatten(0, -2)[rows]) - teacher_ND
    if not form.startswith("relative"):
        return difference, difference.new_ones(())
    norm = torch.linalg.vector_norm(teacher_ND, dim=-1).clamp_min(SMALLEST_NORM)
    return difference, norm.square() if form == "relative_squared" else norm


def upcast(x: Tensor) -> Tensor:
    """At least float32."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def chunks(tokens: int, size: int = CHUNK_TOKENS) -> list[slice]:
    """So many tokens in pieces."""
    return [slice(start, start + size) for start in range(0, tokens, size)]


def ignore(values: Tensor, weight_N: Tensor) -> Tensor:
    """Exactly 0 in the rows that do not count, whatever they hold."""
    mask = weight_N == 0
    return values.masked_fill(mask if values.dim() == 1 else mask[:, None], 0.0)


def token_weights(mask: Tensor | None, rows_Nx: Tensor, total: float | None = None) -> Tensor:
    """1 / count for the counted tokens and 0 for the others, shape (N,).

    Args:
        mask: which tokens count; None for all.
        rows_Nx: gives number, device and dtype.
        total: the count, where tokens of other batches belong to it, too.
    """
    dtype = torch.promote_types(rows_Nx.dtype, torch.float32)
    counted_N = rows_Nx.new_ones(rows_Nx.shape[0], dtype=dtype) if mask is None else mask.flatten().to(dtype)
    return counted_N / (counted_N.sum().clamp_min(1) if total is None else max(total, 1))

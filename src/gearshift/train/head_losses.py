"""Losses of the next token from hidden states, without ever holding the logits of all tokens.

The head's matrix product, the softmax and the gradient are done for a chunk of tokens at a time, and the
gradient of the hidden states is computed along with the loss. What is kept for the backward pass is of the
hidden states' size: memory does not grow with the vocabulary, beside the head itself.

Shape letters: N tokens, C tokens of a chunk, V vocabulary, D hidden size, K likeliest tokens.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from gearshift.train.losses import CHUNK_TOKENS, chunks, ignore, upcast

# Smallest probability of what lies outside the likeliest tokens, so that its logarithm exists.
SMALLEST_REST = 1e-12


@dataclass(frozen=True)
class FullTeacher:
    """A teacher that is there: its hidden states and its head.

    Attributes:
        hidden_ND: normed hidden states before the head.
        head_VD: its head's weight.
    """

    hidden_ND: Tensor
    head_VD: Tensor

    def log_probabilities(self, rows: slice, log_student_CV: Tensor, temperature: float) -> Tensor:
        """Of a chunk, (C, V)."""
        logits_CV = upcast(project(self.hidden_ND[rows], self.head_VD))
        return torch.log_softmax(logits_CV / temperature, dim=-1)


@dataclass(frozen=True)
class TopKTeacher:
    """A teacher of whom only the likeliest tokens were written down.

    All other tokens together are one more outcome, whose probability is what the likeliest leave. Spreading
    it over those tokens as the student does gives that outcome's divergence and its exact gradient.

    Attributes:
        tokens_NK: the likeliest tokens.
        log_probabilities_NK: their log probabilities, at temperature 1.
    """

    tokens_NK: Tensor
    log_probabilities_NK: Tensor

    def log_probabilities(self, rows: slice, log_student_CV: Tensor, temperature: float) -> Tensor:
        """Of a chunk, (C, V)."""
        assert temperature == 1, "likeliest tokens are written down at temperature 1"
        tokens_CK, known_CK = self.tokens_NK[rows].long(), upcast(self.log_probabilities_NK[rows])
        rest_C = (1 - known_CK.exp().sum(-1)).clamp_min(SMALLEST_REST).log()
        student_rest_CV = log_student_CV.scatter(1, tokens_CK, float("-inf"))
        of_rest_CV = student_rest_CV - torch.logsumexp(student_rest_CV, dim=-1, keepdim=True)
        return (of_rest_CV + rest_C[:, None]).scatter(1, tokens_CK, known_CK.to(of_rest_CV.dtype))


Teacher = FullTeacher | TopKTeacher


@dataclass(frozen=True)
class HeadWeights:
    """What each loss counts, as in a recipe.

    Attributes:
        forward_kl: KL(teacher || student).
        reverse_kl: KL(student || teacher).
        cross_entropy: -log p(target), at temperature 1.
        temperature: logits are divided by it for both divergences, which are multiplied by its square, so
            that their gradients keep their size (Hinton et al., arXiv 1503.02531).
    """

    forward_kl: float = 0.0
    reverse_kl: float = 0.0
    cross_entropy: float = 0.0
    temperature: float = 1.0


def head_losses(
    hidden_ND: Tensor,
    head_VD: Tensor,
    weights: HeadWeights,
    weight_N: Tensor,
    *,
    teacher: Teacher | None = None,
    targets_N: Tensor | None = None,
    chunk: int = CHUNK_TOKENS,
) -> tuple[Tensor, Tensor]:
    """The weighted loss of the next token, and its terms.

    Args:
        hidden_ND: the student's normed hidden states.
        head_VD: the student's head; it gets a gradient if it wants one.
        weights: what each term counts.
        weight_N: what each token counts; tokens of weight 0 may hold anything.
        teacher: needed for the divergences; no gradient flows to it.
        targets_N: the next tokens, needed for the cross-entropy; any number where the weight is 0.
        chunk: tokens whose logits exist at a time.

    Returns:
        The loss, a scalar; and the sums of forward KL, reverse KL and cross-entropy, (3), each with the
        tokens' weights but without its own, in nats. A term of weight 0 is not computed and is 0.
    """
    assert teacher is not None or not (weights.forward_kl or weights.reverse_kl), "divergences need a teacher"
    assert targets_N is not None or not weights.cross_entropy, "a cross-entropy needs targets"
    return _HeadLosses.apply(hidden_ND, head_VD, weight_N, weights, teacher, targets_N, chunk)


class _HeadLosses(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,  # noqa: ANN401 - autograd's own context
        hidden_ND: Tensor,
        head_VD: Tensor,
        weight_N: Tensor,
        weights: HeadWeights,
        teacher: Teacher | None,
        targets_N: Tensor | None,
        chunk: int,
    ) -> tuple[Tensor, Tensor]:
        gradient_ND = torch.empty_like(hidden_ND) if ctx.needs_input_grad[0] else None
        # Summed in float32 over chunks: bfloat16 would lose the small ones.
        gradient_VD = torch.zeros_like(head_VD, dtype=weight_N.dtype) if ctx.needs_input_grad[1] else None
        terms = weight_N.new_zeros(3)
        for rows in chunks(hidden_ND.shape[0], chunk):
            logits_CV = upcast(project(hidden_ND[rows], head_VD))
            targets_C = None if targets_N is None else targets_N[rows]
            terms_C3, slope_CV = _chunk(logits_CV, rows, weights, teacher, targets_C)
            terms += weight_N[rows] @ ignore(terms_C3, weight_N[rows])
            slope_CV = ignore(slope_CV.mul_(weight_N[rows, None]), weight_N[rows])
            if gradient_ND is not None:
                gradient_ND[rows] = slope_CV.to(head_VD.dtype) @ head_VD
            if gradient_VD is not None:
                hidden_CD = ignore(hidden_ND[rows], weight_N[rows]).to(slope_CV.dtype)
                gradient_VD += slope_CV.mT @ hidden_CD
        ctx.save_for_backward(gradient_ND, gradient_VD)
        ctx.head_dtype = head_VD.dtype
        ctx.mark_non_differentiable(terms)
        factors = (weights.forward_kl, weights.reverse_kl, weights.cross_entropy)
        return terms @ terms.new_tensor(factors), terms

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride] - the decorator hides the names
        ctx: Any,  # noqa: ANN401
        upstream: Tensor,
        _: Tensor,
    ) -> tuple[Tensor | None, Tensor | None, None, None, None, None, None]:
        gradient_ND, gradient_VD = ctx.saved_tensors
        if gradient_ND is not None:
            gradient_ND = gradient_ND * upstream.to(gradient_ND.dtype)
        if gradient_VD is not None:
            gradient_VD = (gradient_VD * upstream).to(ctx.head_dtype)
        return gradient_ND, gradient_VD, None, None, None, None, None


def tokens_of_chunk(logits: int, vocabulary: int) -> int:
    """Tokens whose logits may exist at a time: the larger the vocabulary, the fewer, at least one."""
    return max(1, logits // vocabulary)


def project(hidden_CD: Tensor, head_VD: Tensor) -> Tensor:
    """Logits (C, V) in the head's precision."""
    return hidden_CD.to(head_VD.dtype) @ head_VD.mT


def _chunk(
    logits_CV: Tensor, rows: slice, weights: HeadWeights, teacher: Teacher | None, targets_C: Tensor | None
) -> tuple[Tensor, Tensor]:
    """The terms of each token, (C, 3), and the gradient of their weighted sum by the logits, (C, V)."""
    terms_C3 = logits_CV.new_zeros(logits_CV.shape[0], 3)
    slope_CV = torch.zeros_like(logits_CV)
    if weights.cross_entropy:
        assert targets_C is not None
        log_student = torch.log_softmax(logits_CV, dim=-1)
        targets = targets_C.clamp(0, logits_CV.shape[1] - 1)[:, None]
        terms_C3[:, 2] = -log_student.gather(1, targets).squeeze(1)
        slope_CV += (
            log_student.exp_()
            .scatter_add_(1, targets, -torch.ones_like(log_student[:, :1]))
            .mul_(weights.cross_entropy)
        )
    if teacher is not None and (weights.forward_kl or weights.reverse_kl):
        _divergences(logits_CV, rows, weights, teacher, terms_C3, slope_CV)
    return terms_C3, slope_CV


def _divergences(
    logits_CV: Tensor,
    rows: slice,
    weights: HeadWeights,
    teacher: Teacher,
    terms_C3: Tensor,
    slope_CV: Tensor,
) -> None:
    """Add both divergences and their gradients.

    With p the teacher, q = softmax(z / t) the student: d KL(p || q) / dz = (q - p) / t, and
    d KL(q || p) / dz = q (log q - log p - KL(q || p)) / t.
    """
    temperature = weights.temperature
    log_q = torch.log_softmax(logits_CV / temperature, dim=-1)
    log_p = teacher.log_probabilities(rows, log_q, temperature)
    q = log_q.exp()
    ratio = log_q - log_p
    if weights.forward_kl:
        p = log_p.exp()
        terms_C3[:, 0] = -torch.linalg.vecdot(p, ratio) * temperature**2
        slope_CV += (q - p).mul_(weights.forward_kl * temperature)
    if weights.reverse_kl:
        divergence_C1 = torch.linalg.vecdot(q, ratio)[:, None]
        terms_C3[:, 1] = divergence_C1.squeeze(1) * temperature**2
        slope_CV += q.mul_(ratio.sub_(divergence_C1)).mul_(weights.reverse_kl * temperature)

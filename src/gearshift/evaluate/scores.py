"""Scores of one batch: held-out loss, divergence from the teacher, and recall.

Shape letters: B batch, T tokens, V vocabulary, N predicted tokens of all sequences together, A answer
places.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from gearshift.evaluate.held_out import EncodedExample
from gearshift.train.losses import CHUNK_TOKENS, TeacherDistribution


def loss_and_kl(logits_NV: Tensor, targets_N: Tensor, teacher: TeacherDistribution) -> tuple[float, float]:
    """Sum over tokens of -log p(target) and of KL(teacher || student), in nats.

    Both come out of the same log-softmax, in float32, chunk by chunk over tokens. The sums stay on the device
    until the end, so that a GPU is waited for once.
    """
    sums_2 = torch.zeros(2, dtype=torch.float64, device=logits_NV.device)
    for start in range(0, logits_NV.shape[0], CHUNK_TOKENS):
        rows = slice(start, start + CHUNK_TOKENS)
        log_student = torch.log_softmax(logits_NV[rows].float(), dim=-1)
        sums_2[0] -= log_student.gather(1, targets_N[rows, None]).sum()
        cross_entropy = -torch.linalg.vecdot(teacher.probabilities_NV[rows], log_student)
        sums_2[1] += (cross_entropy - teacher.entropy_N[rows]).sum()
    loss, kl = sums_2.tolist()
    return loss, kl


class RecallBatch:
    """Recall examples as one batch, padded on the right, where causality keeps the padding from them.

    Attributes:
        ids_BT: tokens.
        places_A: where some example's answer is predicted; logits are needed there only.
    """

    def __init__(self, examples: Sequence[EncodedExample]) -> None:
        length = max(len(example.tokens) for example in examples)
        padded = [example.tokens + (0,) * (length - len(example.tokens)) for example in examples]
        self.ids_BT = torch.tensor(padded)
        asked_BT = torch.zeros(self.ids_BT.shape, dtype=torch.bool)
        for row, example in enumerate(examples):
            # The token at place t is predicted at place t - 1.
            asked_BT[row, example.prompt_length - 1 : len(example.tokens) - 1] = True
        self.places_A = asked_BT.any(0).nonzero().flatten()
        self._asked_BA = asked_BT[:, self.places_A]

    def recalled(self, logits_BAV: Tensor) -> list[bool]:
        """Which examples have every token of their answer as the most likely one, given all before it."""
        right_BA = logits_BAV.argmax(-1).cpu() == self.ids_BT[:, self.places_A + 1]
        return (right_BA | ~self._asked_BA).all(1).tolist()

"""Scores of one batch: held-out loss, divergence from the teacher, and recall.

Shape letters: B batch, T tokens, V vocabulary, N predicted tokens of all sequences together, A answer places.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from gearshift.evaluate.held_out import EncodedExample
from gearshift.placement import Placement
from gearshift.supernet import SupernetForCausalLM
from gearshift.train.losses import CHUNK_TOKENS, TeacherDistribution


def next_token_logits(model: SupernetForCausalLM, windows_BT: Tensor, placement: Placement) -> Tensor:
    """Logits of every next token that the windows hold, (B * (T - 1), V)."""
    logits_BTV = model(windows_BT, placement=placement, use_cache=False).logits
    return logits_BTV[:, :-1].flatten(0, 1)


def loss_and_kl(logits_NV: Tensor, targets_N: Tensor, teacher: TeacherDistribution) -> tuple[float, float]:
    """Sum over tokens of -log p(target) and of KL(teacher || student), in nats.

    Both come out of the same log-softmax, in float32, chunk by chunk over tokens.
    """
    loss = kl = 0.0
    for start in range(0, logits_NV.shape[0], CHUNK_TOKENS):
        rows = slice(start, start + CHUNK_TOKENS)
        log_student = torch.log_softmax(logits_NV[rows].float(), dim=-1)
        loss -= log_student.gather(1, targets_N[rows, None]).sum().item()
        cross_entropy = -torch.linalg.vecdot(teacher.probabilities_NV[rows], log_student)
        kl += (cross_entropy - teacher.entropy_N[rows]).sum().item()
    return loss, kl


def recalled(
    model: SupernetForCausalLM, examples: Sequence[EncodedExample], placement: Placement, device: torch.device
) -> list[bool]:
    """Which examples have every token of their answer as the most likely one, given all tokens before it.

    Sequences are padded on the right, where causality keeps the padding from them, and logits are computed at
    answer places only.
    """
    length = max(len(example.tokens) for example in examples)
    ids_BT = torch.tensor([example.tokens + (0,) * (length - len(example.tokens)) for example in examples])
    asked_BT = torch.zeros(ids_BT.shape, dtype=torch.bool)
    for row, example in enumerate(examples):
        # The token at place t is predicted at place t - 1.
        asked_BT[row, example.prompt_length - 1 : len(example.tokens) - 1] = True
    places_A = asked_BT.any(0).nonzero().flatten()
    logits_BAV = model(
        ids_BT.to(device), placement=placement, use_cache=False, logits_to_keep=places_A.to(device)
    ).logits
    right_BA = logits_BAV.argmax(-1).cpu() == ids_BT[:, places_A + 1]
    return (right_BA | ~asked_BT[:, places_A]).all(1).tolist()

"""Log-likelihoods of continuations, which is what multiple-choice tasks are judged by.

Shape letters: B batch, T tokens, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from gearshift.placement import Placement
from gearshift.supernet import SupernetForCausalLM


@dataclass(frozen=True)
class Continuation:
    """Tokens to score, and those before them.

    Attributes:
        context: at least one token.
        tokens: at least one token.
    """

    context: tuple[int, ...]
    tokens: tuple[int, ...]


@dataclass(frozen=True)
class ContinuationScore:
    """What a model says of a continuation.

    Attributes:
        log_likelihood: of all its tokens together, nats.
        greedy: each of them is the most likely one, given all before it.
    """

    log_likelihood: float
    greedy: bool


def cut_to(given: Continuation, length: int) -> Continuation:
    """The same with the beginning of the context left out, where it is longer than the model's context."""
    room = max(length - len(given.tokens), 1)
    return Continuation(given.context[-room:], given.tokens)


@torch.inference_mode()
def score_continuations(
    model: SupernetForCausalLM, placement: Placement, given: Sequence[Continuation], batch_size: int
) -> Iterator[tuple[int, ContinuationScore]]:
    """Each continuation's index and score, those of like length together.

    Sequences are padded on the right, where causality keeps the padding from them.
    """
    order = sorted(range(len(given)), key=lambda index: -len(given[index].context + given[index].tokens))
    for start in range(0, len(order), batch_size):
        rows = order[start : start + batch_size]
        sequences = [given[row].context + given[row].tokens for row in rows]
        longest = len(sequences[0])
        padded = [sequence + (0,) * (longest - len(sequence)) for sequence in sequences]
        ids_BT = torch.tensor(padded, device=model.device)
        logits_BTV = model(ids_BT, placement=placement, use_cache=False).logits
        for row, ids_T, logits_TV in zip(rows, ids_BT, logits_BTV, strict=True):
            # The token at place t is predicted at place t - 1.
            first, end = len(given[row].context), len(given[row].context + given[row].tokens)
            log_TV = torch.log_softmax(logits_TV[first - 1 : end - 1].float(), dim=-1)
            wanted_T = ids_T[first:end]
            total = float(log_TV.gather(1, wanted_T[:, None]).sum())
            yield row, ContinuationScore(total, bool((log_TV.argmax(-1) == wanted_T).all()))

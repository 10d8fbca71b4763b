"""From logits to a token, with Transformers' own logits processors. V is the vocabulary."""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import (
    LogitsProcessorList,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from gearshift.serve.embedded.generation import Sampling, Token

# Below this, logits divided by the temperature overflow; vLLM draws the same line.
GREEDY_TEMPERATURE = 1e-5


class Sampler:
    """Chooses the tokens of one sequence; its random numbers are its own, whatever runs beside it."""

    def __init__(self, sampling: Sampling, device: torch.device) -> None:
        self._greedy = sampling.temperature < GREEDY_TEMPERATURE
        self._logprobs = sampling.logprobs
        self._warpers = LogitsProcessorList() if self._greedy else _warpers(sampling)
        self._generator = torch.Generator(device).manual_seed(sampling.seed)
        self._no_ids = torch.empty(1, 0, dtype=torch.long, device=device)

    def sample(self, logits_1V: Tensor) -> Token:
        """The next token."""
        logits_1V = logits_1V.float()
        if self._greedy:
            chosen = int(logits_1V.argmax())
        else:
            probabilities = self._warpers(self._no_ids, logits_1V).softmax(-1)  # pyright: ignore[reportArgumentType] - the ids are not read
            chosen = int(torch.multinomial(probabilities, 1, generator=self._generator))
        return Token(chosen) if self._logprobs is None else _with_logprobs(chosen, logits_1V, self._logprobs)


def _warpers(sampling: Sampling) -> LogitsProcessorList:
    """In the order in which ``generate`` applies them."""
    warpers = LogitsProcessorList()
    if sampling.temperature != 1.0:
        warpers.append(TemperatureLogitsWarper(sampling.temperature))
    if sampling.top_k > 0:
        warpers.append(TopKLogitsWarper(sampling.top_k))
    if sampling.top_p < 1.0:
        warpers.append(TopPLogitsWarper(sampling.top_p))
    return warpers


def _with_logprobs(chosen: int, logits_1V: Tensor, count: int) -> Token:
    logprobs_V = logits_1V[0].log_softmax(-1)
    best = logprobs_V.topk(min(count, len(logprobs_V)))
    alternatives = zip(best.indices.tolist(), best.values.tolist(), strict=True)
    return Token(chosen, float(logprobs_V[chosen]), tuple(alternatives))

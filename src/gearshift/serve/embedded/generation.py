"""What the engine is asked for, and what it answers: plain data."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from gearshift.placement import Placement

FinishReason = Literal["stop", "length"]


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen and when a sequence ends.

    Attributes:
        max_tokens: new tokens at most.
        temperature: 0 for the most likely token, always.
        top_p: only the likeliest tokens with this share of the probability together.
        top_k: only so many of the likeliest tokens; 0 for all.
        seed: of the random choices.
        stop: texts that end the sequence; neither they nor anything behind them is given out.
        end_tokens: tokens that end the sequence; their text is not given out.
        logprobs: how many alternatives to report beside every token's log-probability; None for neither.
        prompt_logprobs: report the log-probabilities of the prompt's own tokens.
    """

    max_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int = 0
    stop: tuple[str, ...] = ()
    end_tokens: frozenset[int] = frozenset()
    logprobs: int | None = None
    prompt_logprobs: bool = False


@dataclass(frozen=True)
class Wanted:
    """One sequence that a request wants.

    Attributes:
        index: its number within the request.
        prompt: tokens to go on from, at least one.
        placement: what runs it.
        sampling: how it goes on.
    """

    index: int
    prompt: tuple[int, ...]
    placement: Placement
    sampling: Sampling


@dataclass(frozen=True)
class Token:
    """A generated token.

    Attributes:
        id: its number in the vocabulary.
        logprob: its log-probability before temperature and truncation; None when not asked for.
        alternatives: the most likely tokens and their log-probabilities, likeliest first.
    """

    id: int
    logprob: float | None = None
    alternatives: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True)
class Piece:
    """What one token adds to a sequence.

    Attributes:
        index: the sequence's number within its request.
        text: new text, empty while it may still turn out to be half a character or a stop string.
        token: the token.
        finish_reason: with the last piece, why it is the last.
        prompt: with the first piece, the prompt's tokens with their log-probabilities, if asked for; that of
            the first token is None.
    """

    index: int
    text: str
    token: Token
    finish_reason: FinishReason | None
    prompt: tuple[Token, ...] | None = None

"""One sequence on its way through the model. T is tokens, V the vocabulary."""

from __future__ import annotations

import torch
from torch import Tensor

from gearshift.serve.embedded.generation import FinishReason, Piece, Token, Wanted
from gearshift.serve.embedded.sampling import Sampler
from gearshift.serve.embedded.text import Decode, TextStream
from gearshift.supernet import SupernetCache, SupernetForCausalLM


class RunningSequence:
    """A sequence, its cache and what it still has to read; all calls come from one thread.

    Attributes:
        finished: its last piece has been made.
    """

    def __init__(self, wanted: Wanted, model: SupernetForCausalLM, decode: Decode) -> None:
        self.finished = False
        self._wanted = wanted
        self._model = model
        self._unread = list(wanted.prompt)
        self._sampler = Sampler(wanted.sampling, model.device)
        self._text = TextStream(decode, wanted.sampling.stop)
        self._made = 0
        self._prompt_logprobs: list[float] = []
        self._cache: SupernetCache | None = None

    def advance(self, most_tokens: int) -> Piece | None:
        """Read some of the prompt, or the last token; once all is read, make a token.

        Args:
            most_tokens: tokens of the prompt to read at most.

        Returns:
            What the new token adds; None as long as the prompt is being read.
        """
        tokens, self._unread = self._unread[:most_tokens], self._unread[most_tokens:]
        logits_1V = self._read(tokens)
        if self._unread:
            return None
        token = self._sampler.sample(logits_1V)
        self._unread = [token.id]
        return self._piece(token)

    def _read(self, tokens: list[int]) -> Tensor:
        placement = self._wanted.placement
        if self._cache is None:
            self._cache = self._model.new_cache(placement)
        tokens_1T = torch.tensor([tokens], device=self._model.device)
        every = self._wanted.sampling.prompt_logprobs and not self._made
        kept = len(tokens) if every else 1
        output = self._model(tokens_1T, past_key_values=self._cache, placement=placement, logits_to_keep=kept)
        if every:
            self._note_prompt(output.logits[0], [*tokens[1:], *self._unread[:1]])
        return output.logits[:, -1]

    def _note_prompt(self, logits_TV: Tensor, following: list[int]) -> None:
        """Log-probabilities of the prompt's tokens that follow the ones just read."""
        if following:
            log_TV = torch.log_softmax(logits_TV[: len(following)].float(), dim=-1)
            following_T1 = torch.tensor(following, device=log_TV.device)[:, None]
            self._prompt_logprobs += log_TV.gather(1, following_T1)[:, 0].tolist()

    def _piece(self, token: Token) -> Piece:
        self._made += 1
        ended = token.id in self._wanted.sampling.end_tokens
        text = "" if ended else self._text.push(token.id)
        reason: FinishReason | None = None
        if ended or self._text.stopped:
            reason = "stop"
        elif self._made == self._wanted.sampling.max_tokens:
            reason = "length"
        if reason is not None:
            self.finished = True
            text += self._text.close()
            # A stop string may complete only with what was held back as half a character.
            reason = "stop" if self._text.stopped else reason
        return Piece(self._wanted.index, text, token, reason, self._prompt())

    def _prompt(self) -> tuple[Token, ...] | None:
        """The prompt's tokens with their log-probabilities, for the first piece."""
        if self._made > 1 or not self._wanted.sampling.prompt_logprobs:
            return None
        pairs = zip(self._wanted.prompt, [None, *self._prompt_logprobs], strict=True)
        return tuple(Token(token, logprob) for token, logprob in pairs)

    def release(self) -> None:
        """Let go of the cache."""
        self._cache = None

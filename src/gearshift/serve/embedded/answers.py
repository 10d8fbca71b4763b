"""OpenAI's forms of answers, whole and in chunks."""

from __future__ import annotations

import time
import uuid
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

from gearshift.serve.embedded.generation import Piece, Token

TokenText = Callable[[int], str]
Json = dict[str, Any]


@dataclass
class Answer:
    """One sequence, collected.

    Attributes:
        pieces: in order.
        offsets: for each piece, how many characters came before it.
        length: characters so far.
    """

    pieces: list[Piece] = field(default_factory=list)
    offsets: list[int] = field(default_factory=list)
    length: int = 0

    def add(self, piece: Piece) -> None:
        """Take the next piece."""
        self.pieces.append(piece)
        self.offsets.append(self.length)
        self.length += len(piece.text)

    def last(self) -> Answer:
        """The latest piece alone, at the place where it is."""
        return Answer(self.pieces[-1:], self.offsets[-1:], self.length)

    @property
    def text(self) -> str:
        """The text so far."""
        return "".join(piece.text for piece in self.pieces)


def usage(prompt_tokens: int, completion_tokens: int) -> Json:
    """How many tokens a request took."""
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": completion_tokens,
        "total_tokens": prompt_tokens + completion_tokens,
    }


class Form(ABC):
    """How one request is answered.

    Args:
        model: as the request named it.
        token_text: a token's text.
        logprobs: whether they were asked for.
        with_usage: a stream ends with the usage, and has an empty place for it in every other chunk.
    """

    prefix: ClassVar[str]
    whole_object: ClassVar[str]
    chunk_object: ClassVar[str]

    def __init__(self, model: str, token_text: TokenText, logprobs: bool, with_usage: bool) -> None:
        self.with_usage = with_usage
        self.logprobs = logprobs
        self._token_text = token_text
        self._head = {"id": f"{self.prefix}-{uuid.uuid4().hex}", "created": int(time.time()), "model": model}

    def whole(self, answers: Sequence[Answer], used: Json) -> Json:
        """The answer as one object."""
        choices = [
            {
                "index": index,
                **self._whole_text(answer.text),
                "logprobs": self._logprobs(answer) if self.logprobs else None,
                "finish_reason": answer.pieces[-1].finish_reason,
                **self._prompt(answer),
            }
            for index, answer in enumerate(answers)
        ]
        return {**self._head, "object": self.whole_object, "choices": choices, "usage": used}

    def opening(self, index: int) -> Iterator[Json]:
        """The chunks before a sequence's first token."""
        yield from ()

    def chunk(self, latest: Answer) -> Json:
        """The chunk for one piece."""
        piece = latest.pieces[0]
        logprobs = self._logprobs(latest) if self.logprobs else None
        return self._chunk(piece.index, self._new_text(piece.text), piece.finish_reason, logprobs)

    def _chunk(self, index: int, text: Json, finish: str | None = None, logprobs: Json | None = None) -> Json:
        choice = {"index": index, **text, "logprobs": logprobs, "finish_reason": finish}
        empty = {"usage": None} if self.with_usage else {}
        return {**self._head, "object": self.chunk_object, "choices": [choice], **empty}

    def closing(self, used: Json) -> Iterator[Json]:
        """The chunks behind the last token."""
        if self.with_usage:
            yield {**self._head, "object": self.chunk_object, "choices": [], "usage": used}

    def _prompt(self, answer: Answer) -> Json:
        """Log-probabilities of the prompt in vLLM's form, where they were asked for."""
        prompt = answer.pieces[0].prompt
        if prompt is None:
            return {}
        told = [
            {str(t.id): {"logprob": t.logprob, "decoded_token": self._token_text(t.id)}} for t in prompt[1:]
        ]
        return {"prompt_logprobs": [None, *told]}

    @abstractmethod
    def _whole_text(self, text: str) -> Json: ...

    @abstractmethod
    def _new_text(self, text: str) -> Json: ...

    @abstractmethod
    def _logprobs(self, answer: Answer) -> Json: ...


class CompletionForm(Form):
    """``/v1/completions``."""

    prefix = "cmpl"
    whole_object = chunk_object = "text_completion"

    def _whole_text(self, text: str) -> Json:
        return {"text": text}

    _new_text = _whole_text

    def _logprobs(self, answer: Answer) -> Json:
        tokens = [piece.token for piece in answer.pieces]
        return {
            "tokens": [self._token_text(token.id) for token in tokens],
            "token_logprobs": [token.logprob for token in tokens],
            "top_logprobs": [self._top(token) for token in tokens],
            "text_offset": answer.offsets,
        }

    def _top(self, token: Token) -> Json:
        """The alternatives and, as OpenAI has it, the chosen token in any case."""
        top = {self._token_text(id): logprob for id, logprob in token.alternatives}
        return {**top, self._token_text(token.id): token.logprob}


class ChatForm(Form):
    """``/v1/chat/completions``."""

    prefix = "chatcmpl"
    whole_object = "chat.completion"
    chunk_object = "chat.completion.chunk"

    def opening(self, index: int) -> Iterator[Json]:
        """Who speaks."""
        yield self._chunk(index, {"delta": {"role": "assistant", "content": ""}})

    def _whole_text(self, text: str) -> Json:
        return {"message": {"role": "assistant", "content": text}}

    def _new_text(self, text: str) -> Json:
        return {"delta": {"content": text}}

    def _logprobs(self, answer: Answer) -> Json:
        return {"content": [self._content(piece.token) for piece in answer.pieces]}

    def _content(self, token: Token) -> Json:
        assert token.logprob is not None
        top = [self._entry(*alternative) for alternative in token.alternatives]
        return {**self._entry(token.id, token.logprob), "top_logprobs": top}

    def _entry(self, token: int, logprob: float) -> Json:
        text = self._token_text(token)
        return {"token": text, "logprob": logprob, "bytes": list(text.encode())}

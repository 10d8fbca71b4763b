"""What HTTP needs of a model and its tokenizer: prompts to tokens, chats to prompts, tokens to text."""

from __future__ import annotations

import copy
import threading
from collections.abc import Sequence
from typing import Any

from transformers import GenerationConfig, PreTrainedTokenizerBase

from gearshift.serve.catalog import RequestError, shortened
from gearshift.serve.embedded.text import Decode


class ContextLengthError(RequestError):
    """A prompt that, with its answer, is longer than the model's context."""

    code = "context_length_exceeded"


class Texts:
    """Reads prompts and writes texts with a supernet's tokenizer; may be used from any thread.

    Args:
        tokenizer: of the supernet directory.
        vocabulary: tokens that the model knows.
        context: tokens that a prompt and its answer may have together.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, vocabulary: int, context: int) -> None:
        self.context = context
        self._vocabulary = vocabulary
        self._encoder = tokenizer
        # Encoding may change a tokenizer's settings for a moment, so it happens one at a time, and never on
        # the copy that the engine decodes with meanwhile.
        self._encoding = threading.Lock()
        self._decoder = copy.deepcopy(tokenizer)

    @property
    def decode(self) -> Decode:
        """Tokens to text, without special tokens."""
        return lambda ids: _as_text(
            self._decoder.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        )

    def token_text(self, token: int) -> str:
        """A single token, special ones too, as log-probabilities show it."""
        return _as_text(self._decoder.decode([token], clean_up_tokenization_spaces=False))

    def read_prompt(self, prompt: str | Sequence[int]) -> tuple[int, ...]:
        """The tokens of a completion's prompt.

        Raises:
            RequestError: it is empty, or has a token that is not in the vocabulary.
            ContextLengthError: it leaves no room for an answer.
        """
        if isinstance(prompt, str):
            return self._checked(self._encode(prompt, special_tokens=True))
        wrong = next((token for token in prompt if not 0 <= token < self._vocabulary), None)
        if wrong is not None:
            raise RequestError(
                f"the prompt has the token {wrong}; expected 0 to {self._vocabulary - 1}", "prompt"
            )
        return self._checked(prompt)

    def read_chat(self, messages: list[dict[str, Any]]) -> tuple[int, ...]:
        """The tokens of a chat, laid out by the tokenizer's own template.

        Raises:
            RequestError: the tokenizer has no template, or it cannot lay out these messages.
            ContextLengthError: it leaves no room for an answer.
        """
        if not self._encoder.chat_template:
            raise RequestError(
                "this model's tokenizer has no chat template, so it cannot chat; "
                "send the prompt as text to /v1/completions"
            )
        try:
            text = self._encoder.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        except Exception as error:  # a template is a program, and fails as it likes on what it did not expect
            raise RequestError(
                f"the model's chat template cannot lay out these messages: {shortened(str(error))}",
                "messages",
            ) from None
        return self._checked(self._encode(_as_text(text), special_tokens=False), "messages")

    def _encode(self, text: str, special_tokens: bool) -> list[int]:
        with self._encoding:
            return self._encoder.encode(text, add_special_tokens=special_tokens, verbose=False)

    def _checked(self, prompt: Sequence[int], param: str = "prompt") -> tuple[int, ...]:
        if not prompt:
            raise RequestError("the prompt is empty; expected some text to go on from", param)
        self.room(len(prompt), 1, param)
        return tuple(prompt)

    def room(self, prompt_tokens: int, new_tokens: int, param: str = "max_tokens") -> None:
        """Refuse what does not fit.

        Raises:
            ContextLengthError: a prompt and an answer of these lengths are longer than the context.
        """
        if prompt_tokens + new_tokens > self.context:
            raise ContextLengthError(
                f"a prompt of {prompt_tokens} tokens and {new_tokens} new ones; expected at most "
                f"{self.context} together, the model's context",
                param,
            )


def end_tokens(config: GenerationConfig, tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    """The tokens that end a text: those of ``generation_config.json``, else the tokenizer's."""
    given = config.eos_token_id if config.eos_token_id is not None else tokenizer.eos_token_id
    if given is None:
        return frozenset()
    return frozenset(int(token) for token in (given if isinstance(given, list) else [given]))


def _as_text(text: object) -> str:
    assert isinstance(text, str)
    return text

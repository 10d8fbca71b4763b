"""Conversations as tokens, through the tokenizer's own chat template, and which of them are answers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from gearshift.train.documents import DataError

Message = dict[str, Any]
ANSWERING = "assistant"


def encode_chat(
    tokenizer: PreTrainedTokenizerBase, messages: object, where: str
) -> tuple[np.ndarray, np.ndarray]:
    """A conversation's tokens, and which of them belong to an answer, (tokens,) each.

    An answer begins where the template's prompt for an answer ends, and ends with its turn, the token that
    closes it among it.

    Args:
        tokenizer: one with a chat template and with offsets, as every fast tokenizer has.
        messages: a list of objects with ``role`` and ``content``.
        where: what to call the conversation in a message.

    Raises:
        DataError: it is no conversation, has no answer, or the template changes earlier turns later on, so
            that nobody can say where an answer is.
    """
    turns = _checked(messages, where)
    if not tokenizer.chat_template:
        raise DataError("the tokenizer has no chat template; put the teacher's chat_template.jinja beside it")
    text = _render(tokenizer, turns)
    spans = [
        _answer_span(tokenizer, turns, index, text, where)
        for index, turn in enumerate(turns)
        if turn["role"] == ANSWERING
    ]
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    starts = np.asarray([start for start, _ in encoded["offset_mapping"]], dtype=np.int64)  # pyright: ignore
    answers = np.zeros(len(starts), dtype=bool)
    for begin, end in spans:
        answers |= (starts >= begin) & (starts < end)
    return np.asarray(encoded["input_ids"], dtype=np.int32), answers


def _checked(messages: object, where: str) -> list[Message]:
    if not isinstance(messages, Sequence) or isinstance(messages, str) or not messages:
        raise DataError(f"{where}: expected a list of messages, found {messages!r:.60}")
    for message in messages:
        if (
            not isinstance(message, dict)
            or not isinstance(message.get("role"), str)
            or "content" not in message
        ):
            raise DataError(f"{where}: expected messages with 'role' and 'content', found {message!r:.60}")
    if not any(message["role"] == ANSWERING for message in messages):
        raise DataError(f"{where}: no message has the role {ANSWERING!r}, so there is nothing to learn")
    return list(messages)


def _render(tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message], prompt: bool = False) -> str:
    rendered = tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=prompt)
    assert isinstance(rendered, str)
    return rendered


def _answer_span(
    tokenizer: PreTrainedTokenizerBase, turns: Sequence[Message], index: int, text: str, where: str
) -> tuple[int, int]:
    """Where the answer of one turn begins and ends in the text of the whole conversation."""
    before, after = _render(tokenizer, turns[:index], prompt=True), _render(tokenizer, turns[: index + 1])
    if not after.startswith(before) or not text.startswith(after):
        raise DataError(
            f"{where}: the chat template writes turn {index + 1} differently when others follow; split the "
            "conversation so that this is its last turn"
        )
    return len(before), len(after)

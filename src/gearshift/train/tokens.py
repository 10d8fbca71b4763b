"""From text files to token streams with the tokenizer of a supernet directory."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from gearshift.errors import GearshiftError
from gearshift.train.chat import encode_chat
from gearshift.train.data import PackedTokens, read_documents
from gearshift.train.documents import DataError, Row, column_of
from gearshift.train.packing import Encode as EncodeRow

Encode = Callable[[str], Sequence[int]]


class TokenizerError(GearshiftError):
    """A directory's tokenizer is missing or does not fit."""


def load_tokenizer(directory: Path) -> PreTrainedTokenizerBase:
    """Load the tokenizer that a supernet directory took over from its teacher.

    Raises:
        TokenizerError: there is none, or it has no end-of-text token.
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(directory, local_files_only=True)
    except (OSError, ValueError, KeyError) as error:
        reason = " ".join(str(error).split())
        raise TokenizerError(f"{directory} holds no tokenizer ({reason}); copy the teacher's there") from None
    if tokenizer.eos_token_id is None:
        raise TokenizerError(
            f"the tokenizer in {directory} has no eos_token; name one in tokenizer_config.json"
        )
    return tokenizer


def encoder(tokenizer: PreTrainedTokenizerBase) -> Encode:
    """A function from a text to its tokens, without special tokens and without a warning for a long text."""
    return lambda text: tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]  # pyright: ignore[reportReturnType]


def pack_files(paths: Iterable[Path], tokenizer: PreTrainedTokenizerBase) -> PackedTokens:
    """Every document of the files or folders as one stream, an end token after each.

    Raises:
        DataError: a path is missing or of an unknown kind.
    """
    documents = (text for path in paths for text in read_documents(path))
    end_token = tokenizer.eos_token_id
    assert isinstance(end_token, int)
    return PackedTokens.from_documents(documents, encoder(tokenizer), end_token)


def text_encoder(tokenizer: PreTrainedTokenizerBase, column: str) -> EncodeRow:
    """From a row with a text to its tokens and an end token; all of them are learned."""
    encode, end_token = encoder(tokenizer), tokenizer.eos_token_id

    def run(row: Row, where: str) -> tuple[npt.NDArray[np.integer], npt.NDArray[np.bool_]]:
        text = column_of(row, column, where)
        if not isinstance(text, str):
            raise DataError(f'{where}: expected a text under "{column}", found {text!r:.60}')
        tokens = np.asarray([*encode(text), end_token], dtype=np.int32)
        return tokens, np.ones(len(tokens), dtype=bool)

    return run


def chat_encoder(tokenizer: PreTrainedTokenizerBase, column: str) -> EncodeRow:
    """From a row with a conversation to its tokens, and which of them are answers."""
    return lambda row, where: encode_chat(tokenizer, column_of(row, column, where), where)


def check_tokenizer(tokenizer: PreTrainedTokenizerBase, vocabulary: int | None, directory: Path) -> None:
    """Refuse a tokenizer that has tokens which the model of this directory does not know.

    Raises:
        TokenizerError: it has.
    """
    assert vocabulary is not None
    largest = max(tokenizer.get_vocab().values(), default=0)
    if largest >= vocabulary:
        raise TokenizerError(
            f"the tokenizer in {directory} has tokens up to {largest}, but the model knows {vocabulary}; "
            "copy the teacher's tokenizer there"
        )


def check_vocabulary(tokens: npt.NDArray[np.integer], vocabulary: int | None, directory: Path) -> None:
    """Refuse tokens that the model of this directory does not know.

    Raises:
        TokenizerError: there is one.
    """
    assert vocabulary is not None
    largest = int(tokens.max())
    if largest >= vocabulary:
        raise TokenizerError(
            f"the tokenizer in {directory} made token {largest}, but the model knows {vocabulary}; "
            "copy the teacher's tokenizer there"
        )


def tokens_digest(tokens: PackedTokens) -> str:
    """Twelve hexadecimal digits that name a token stream."""
    return hashlib.sha256(np.ascontiguousarray(tokens.tokens).tobytes()).hexdigest()[:12]

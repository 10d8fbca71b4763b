"""Text comes out a token at a time, and is the text of all tokens."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models
from transformers import PreTrainedTokenizerBase

from gearshift.serve.embedded.text import Detokenizer, StopStrings, TextStream

ALL_BYTES = list(range(257))
CHARACTERS = "aé€😀\u200d\ufffd中 \n"


def byte_tokens(tokenizer: PreTrainedTokenizerBase, data: bytes) -> list[int]:
    """The tiny tokenizer has one token a byte; this finds them for bytes that are no text, too."""
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    names = bytes_to_unicode()
    ids = tokenizer.convert_tokens_to_ids([names[byte] for byte in data])
    assert isinstance(ids, list)
    return ids


def decoded(tokenizer: PreTrainedTokenizerBase, tokens: Sequence[int]) -> str:
    text = tokenizer.decode(list(tokens), skip_special_tokens=True)
    assert isinstance(text, str)
    return text


def pieces(tokenizer: PreTrainedTokenizerBase, tokens: Sequence[int]) -> list[str]:
    detokenizer = Detokenizer(lambda ids: decoded(tokenizer, ids))
    return [*(detokenizer.push(token) for token in tokens), detokenizer.close()]


@given(st.lists(st.sampled_from(ALL_BYTES), max_size=200))
def test_any_bytes_come_out_as_they_would_at_once(tokenizer: PreTrainedTokenizerBase, tokens: list[int]):
    assert "".join(pieces(tokenizer, tokens)) == decoded(tokenizer, tokens)


@given(st.text(st.sampled_from(CHARACTERS), max_size=120))
def test_a_character_is_never_cut(tokenizer: PreTrainedTokenizerBase, text: str):
    parts = pieces(tokenizer, byte_tokens(tokenizer, text.encode()))
    assert "".join(parts) == text
    if "\ufffd" not in text:
        assert all("\ufffd" not in part for part in parts)


def test_a_character_comes_with_its_last_byte(tokenizer: PreTrainedTokenizerBase):
    assert pieces(tokenizer, byte_tokens(tokenizer, "a€b".encode())) == ["a", "", "", "€", "b", ""]


@pytest.mark.parametrize("data", [b"\xff", b"\xe2\x82", b"\x80", b"\x00"])
def test_a_long_row_of_broken_or_special_tokens_stays_cheap(tokenizer: PreTrainedTokenizerBase, data: bytes):
    longest = 0

    def decode(ids: list[int]) -> str:
        nonlocal longest
        longest = max(longest, len(ids))
        return decoded(tokenizer, ids)

    for tokens in (byte_tokens(tokenizer, data * 500), [0] * 500):
        detokenizer = Detokenizer(decode)
        text = "".join([*map(detokenizer.push, tokens), detokenizer.close()])
        assert text == decoded(tokenizer, tokens)
    assert longest <= 65


def test_a_tokenizer_that_writes_blanks_before_words():
    """As SentencePiece's do: a word's blank belongs to it unless it is the first."""
    vocabulary = {"▁one": 0, "▁two": 1, "s": 2, "<0xE2>": 3, "<0x82>": 4, "<0xAC>": 5}
    tokenizer = Tokenizer(models.BPE(vocabulary, [], byte_fallback=True))
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokens = [0, 1, 2, 3, 4, 5, 3, 4, 5, 1, 0]
    detokenizer = Detokenizer(tokenizer.decode)
    parts = [*map(detokenizer.push, tokens), detokenizer.close()]
    assert parts == ["one", " two", "s", "", "", "€", "", "", "€", " two", " one", ""]


def stopped(stops: Sequence[str], parts: Sequence[str]) -> tuple[str, bool]:
    stop_strings = StopStrings(stops)
    text = ""
    for part in parts:
        text += stop_strings.push(part)
        if stop_strings.found:
            return text, True
    return text + stop_strings.close(), False


@given(
    st.lists(st.text("ab", min_size=1, max_size=4), max_size=3),
    st.lists(st.text("abc", max_size=3), max_size=20),
)
def test_text_ends_before_the_first_stop_string_however_it_is_cut(stops: list[str], parts: list[str]):
    """Cut into single letters, it must stop at the earliest end; the text before depends on nothing else."""
    letters = list("".join(parts))
    text, found = stopped(stops, letters)
    whole = "".join(letters)
    ends = [whole.find(stop) + len(stop) for stop in stops if stop in whole]
    assert found == bool(ends)
    if not found:
        assert text == whole
    else:
        seen = whole[: min(ends)]
        assert text == seen[: min(seen.find(stop) for stop in stops if stop in seen)]
    assert stopped(stops, parts)[1] == found


@given(st.text("ab", min_size=1, max_size=4), st.lists(st.text("abc", max_size=3), max_size=20))
def test_with_one_stop_string_the_pieces_do_not_matter(stop: str, parts: list[str]):
    whole = "".join(parts)
    assert stopped([stop], parts) == (whole.partition(stop)[0], stop in whole)


def test_what_may_begin_a_stop_string_is_held_back():
    stop_strings = StopStrings(["END", "xENx"])
    assert [stop_strings.push(letter) for letter in "axENo"] == ["a", "", "", "", "xENo"]
    assert [stop_strings.push(letter) for letter in "EN"] == ["", ""]
    assert stop_strings.close() == "EN"


def test_a_stop_string_that_ends_in_half_a_character(tokenizer: PreTrainedTokenizerBase):
    """Half a character at the end of a text shows as the replacement character, which can be asked for."""
    stream = TextStream(lambda ids: decoded(tokenizer, ids), ["\ufffd"])
    assert [stream.push(token) for token in byte_tokens(tokenizer, b"a\xe2\x82")] == ["a", "", ""]
    assert not stream.stopped
    assert stream.close() == ""
    assert stream.stopped

"""The teacher's text: Python sources of this machine, a tokenizer trained on them, their tokens on disk."""

from __future__ import annotations

import hashlib
import random
import sysconfig
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from gearshift.files import atomic_file, read_json, write_json
from gearshift.train.data import is_held_out, python_sources, standard_library_root

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

END = "<|endoftext|>"
PAD = "<|pad|>"
TOKENIZER_SAMPLE_CHARACTERS = 60_000_000
FILLER_LINES = 40_000
_DOCUMENTS_AT_ONCE = 2000
_LONGEST_TOKEN = 24


@dataclass(frozen=True)
class Corpus:
    """What ``prepare`` found and made; the files lie in its folder."""

    train_files: int
    held_out_files: int
    characters: int
    train_tokens: int
    held_out_tokens: int
    tokenizer_seconds: float
    encode_seconds: float


def prepare(
    folder: Path, roots: list[Path], vocabulary: int, seed: int, tokenizer_file: Path | None = None
) -> Corpus:
    """Collect the sources, train the tokenizer, encode.

    Writes tokenizer.json, train.npy, held_out.npy, filler.txt and, last, corpus.json to ``folder``. A folder
    that already holds a finished corpus is used as it is; with ``tokenizer_file`` no tokenizer is trained.
    """
    summary = folder / "corpus.json"
    if summary.exists():
        return Corpus(**read_json(summary))
    folder.mkdir(parents=True, exist_ok=True)
    train, held_out = _collect(roots)
    random.Random(seed).shuffle(train)
    began = time.monotonic()
    if tokenizer_file:
        tokenizer = Tokenizer.from_file(str(tokenizer_file))
    else:
        tokenizer = train_tokenizer(train, vocabulary)
    tokenizer.save(str(folder / "tokenizer.json"))
    trained = time.monotonic()
    print(f"tokenizer of {tokenizer.get_vocab_size()} tokens in {trained - began:.0f} s", flush=True)
    train_tokens = _encode_to(folder / "train.npy", tokenizer, train)
    held_out_tokens = _encode_to(folder / "held_out.npy", tokenizer, held_out)
    (folder / "filler.txt").write_text("\n".join(_filler(train)), encoding="utf-8")
    corpus = Corpus(
        train_files=len(train),
        held_out_files=len(held_out),
        characters=sum(map(len, train)) + sum(map(len, held_out)),
        train_tokens=train_tokens,
        held_out_tokens=held_out_tokens,
        tokenizer_seconds=trained - began,
        encode_seconds=time.monotonic() - trained,
    )
    write_json(summary, asdict(corpus))
    return corpus


def default_roots() -> list[Path]:
    """The standard library and the packages of the running interpreter."""
    paths = sysconfig.get_paths()
    roots = [standard_library_root(), Path(paths["purelib"]), Path(paths["platlib"])]
    return list(dict.fromkeys(root.resolve() for root in roots if root.is_dir()))


def _collect(roots: list[Path]) -> tuple[list[str], list[str]]:
    """Texts to train on and held-out texts; a text found under several roots counts where it came first."""
    train: list[str] = []
    held_out: list[str] = []
    seen: set[bytes] = set()
    for root in roots:
        began = time.monotonic()
        for relative, text in python_sources(root):
            digest = hashlib.sha1(text.encode()).digest()
            if digest not in seen:
                seen.add(digest)
                (held_out if is_held_out(relative) else train).append(text)
        count = len(train) + len(held_out)
        print(f"{count} files so far, {time.monotonic() - began:.0f} s for this root", flush=True)
    return train, held_out


def train_tokenizer(texts: list[str], vocabulary: int) -> Tokenizer:
    """Byte-level BPE on the first texts; every digit is a token of its own."""
    tokenizer = Tokenizer(models.BPE())
    digits = pre_tokenizers.Digits(individual_digits=True)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(  # pyright: ignore[reportAttributeAccessIssue]
        [digits, pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()  # pyright: ignore[reportAttributeAccessIssue]
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=[END, PAD],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        max_token_length=_LONGEST_TOKEN,
        show_progress=False,
    )
    tokenizer.train_from_iterator(_sample(texts), trainer=trainer)
    return tokenizer


def _sample(texts: list[str]) -> Iterator[str]:
    left = TOKENIZER_SAMPLE_CHARACTERS
    for text in texts:
        if left <= 0:
            return
        left -= len(text)
        yield text


def _encode_to(path: Path, tokenizer: Tokenizer, texts: list[str]) -> int:
    """Encode the texts, an end token after each, into one uint16 array on disk; returns its length."""
    end = end_token(tokenizer)
    pieces: list[npt.NDArray[np.uint16]] = []
    for first in range(0, len(texts), _DOCUMENTS_AT_ONCE):
        for encoding in tokenizer.encode_batch_fast(texts[first : first + _DOCUMENTS_AT_ONCE]):
            pieces.append(np.array([*encoding.ids, end], dtype=np.uint16))
        if first // _DOCUMENTS_AT_ONCE % 5 == 0:
            print(f"encoded {first} of {len(texts)} files", flush=True)
    tokens = np.concatenate(pieces)
    with atomic_file(path) as partial, partial.open("wb") as file:
        np.save(file, tokens)
    return len(tokens)


def end_token(tokenizer: Tokenizer) -> int:
    """The id of the token that ends a document."""
    end = tokenizer.token_to_id(END)
    assert end is not None
    return end


def _filler(texts: list[str]) -> list[str]:
    """Lines of real code, in their order, for the needle task."""
    lines: list[str] = []
    for text in texts:
        if len(lines) >= FILLER_LINES:
            break
        lines.extend(line.rstrip() for line in text.splitlines()[:200] if _is_filler(line))
    return lines


def _is_filler(line: str) -> bool:
    return 4 < len(line) < 120 and line.isascii()


def wrap_tokenizer(path: Path, context: int) -> PreTrainedTokenizerFast:
    """The tokenizer of a tokenizer.json as a Transformers tokenizer; it adds no tokens of its own."""
    from transformers import PreTrainedTokenizerFast  # here, so that the worker processes start fast

    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_file(str(path)),
        bos_token=END,
        eos_token=END,
        pad_token=PAD,
        model_max_length=context,
        clean_up_tokenization_spaces=False,
    )

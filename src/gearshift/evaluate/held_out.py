"""What placements are judged on: windows of held-out text and recall examples, as tokens."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
from transformers import PreTrainedTokenizerBase

from gearshift.evaluate.recall import RecallExample, encode_example, read_examples
from gearshift.train.tokens import encoder, pack_files


@dataclass(frozen=True)
class EncodedExample:
    """A recall example as tokens.

    Attributes:
        task: which kind of recall it asks for.
        tokens: prompt and answer together.
        prompt_length: how many of them are the prompt.
    """

    task: str
    tokens: tuple[int, ...]
    prompt_length: int


@dataclass(frozen=True)
class HeldOut:
    """Windows of held-out text and recall examples.

    Attributes:
        name: the file's name and a digest of all tokens: equal names mean equal data.
        windows: tokens, (windows, sequence length).
        examples: sorted by length, so that neighbours pad each other little.
    """

    name: str
    windows: npt.NDArray[np.int64]
    examples: tuple[EncodedExample, ...]

    def window_batches(self, batch_size: int) -> list[npt.NDArray[np.int64]]:
        """The windows, ``batch_size`` at a time."""
        return [self.windows[start : start + batch_size] for start in range(0, len(self.windows), batch_size)]

    def example_batches(self, tokens: int) -> list[tuple[EncodedExample, ...]]:
        """The examples, as many at a time as fit into ``tokens`` when padded, at least one."""
        return list(_fill_batches(self.examples, tokens))


def read_held_out(
    data: Path,
    recall: Path | None,
    tokenizer: PreTrainedTokenizerBase,
    *,
    tokens: int,
    sequence_length: int,
) -> HeldOut:
    """Read held-out text and recall examples.

    Args:
        data: a document file or folder.
        recall: a file of recall examples, or None.
        tokenizer: of the supernet.
        tokens: how many tokens of text to use at most; they are spread evenly over the file.
        sequence_length: tokens of a window.

    Raises:
        DataError: the text is missing, of an unknown kind or shorter than one window.
        FileFormatError: the recall examples are missing or damaged.
    """
    windows = pack_files([data], tokenizer).spread_windows(tokens // sequence_length, sequence_length)
    examples = [] if recall is None else [_encode(tokenizer, example) for example in read_examples(recall)]
    examples.sort(key=lambda example: len(example.tokens))
    return HeldOut(f"{data.name}:{_digest(windows, examples)}", windows, tuple(examples))


def _encode(tokenizer: PreTrainedTokenizerBase, example: RecallExample) -> EncodedExample:
    prompt, answer = encode_example(encoder(tokenizer), example)
    return EncodedExample(example.task, (*prompt, *answer), len(prompt))


def _digest(windows: npt.NDArray[np.int64], examples: Sequence[EncodedExample]) -> str:
    digest = hashlib.sha256(repr(windows.shape).encode() + windows.tobytes())
    digest.update(repr(examples).encode())
    return digest.hexdigest()[:12]


def _fill_batches(examples: Sequence[EncodedExample], tokens: int) -> Iterator[tuple[EncodedExample, ...]]:
    batch: list[EncodedExample] = []
    for example in examples:  # by rising length, so the newest one sets the padded length
        if batch and (len(batch) + 1) * len(example.tokens) > tokens:
            yield tuple(batch)
            batch = []
        batch.append(example)
    if batch:
        yield tuple(batch)

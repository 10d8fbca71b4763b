"""Sequences of recall texts for the teacher's training: packed rows of tokens, made by worker processes."""

from __future__ import annotations

import multiprocessing
import os
import random
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
from teacher_corpus import end_token
from tokenizers import Tokenizer

from gearshift.evaluate.recall import SHORTEST, TASKS, make_training_text
from gearshift.files import atomic_file

_ROWS_A_JOB = 64
# Characters a token, rounded up, so that a text of the length asked for fills what is left of a row.
_CHARACTERS_A_TOKEN = {"lookup": 1.9, "copy": 1.7, "needle": 3.0}


@dataclass(frozen=True)
class RowJob:
    """A worker's order: which rows to make from which files."""

    corpus: Path
    sequence_length: int
    rows: int
    seed: int


def make_pool(
    corpus: Path, rows: int, sequence_length: int, seed: int, workers: int
) -> npt.NDArray[np.uint16]:
    """Make ``rows`` rows of recall texts, shape (rows, sequence_length); kept in the corpus folder."""
    path = corpus / f"recall-{rows}x{sequence_length}-{seed}.npy"
    if not path.exists():
        jobs = [
            RowJob(corpus, sequence_length, min(_ROWS_A_JOB, rows - first), seed * 1_000_003 + first)
            for first in range(0, rows, _ROWS_A_JOB)
        ]
        os.environ["TOKENIZERS_PARALLELISM"] = "false"
        context = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(workers, mp_context=context) as executor:
            parts = list(executor.map(make_rows, jobs, chunksize=4))
        with atomic_file(path) as partial, partial.open("wb") as file:
            np.save(file, np.concatenate(parts))
    return np.load(path, mmap_mode="r")


def make_rows(job: RowJob) -> npt.NDArray[np.uint16]:
    """Fill rows with texts of random tasks and lengths, an end token after each; the last text is cut off."""
    rng = random.Random(job.seed)
    tokenizer = Tokenizer.from_file(str(job.corpus / "tokenizer.json"))
    filler = (job.corpus / "filler.txt").read_text(encoding="utf-8").split("\n")
    return np.stack([_make_row(rng, tokenizer, filler, job.sequence_length) for _ in range(job.rows)])


def _make_row(
    rng: random.Random, tokenizer: Tokenizer, filler: list[str], length: int
) -> npt.NDArray[np.uint16]:
    end = end_token(tokenizer)
    tokens: list[int] = []
    # A few tokens before the first text, at times: the tasks must not hang on absolute positions.
    if rng.random() < 0.5:
        tokens.append(end)
    while len(tokens) < length:
        task = rng.choice(TASKS)
        room = int((length - len(tokens)) * _CHARACTERS_A_TOKEN[task])
        size = max(SHORTEST, int(room * rng.choice((1.0, rng.uniform(0.05, 1.0)))))
        text = make_training_text(task, rng, size, filler if rng.random() < 0.5 else ())
        tokens.extend(tokenizer.encode(text, add_special_tokens=False).ids)
        tokens.append(end)
    return np.array(tokens[:length], dtype=np.uint16)

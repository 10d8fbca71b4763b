"""Rows of tokens from documents, and micro-batches from rows; where they stand can be saved and restored.

A row is filled with documents one after another. What is left of a text begins the next row; a conversation
is never cut in two, and the end of a row into which the next one does not fit stays padding.

Shape letters: B rows of a micro-batch, T tokens of a row.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from gearshift.train.documents import Documents, Row

# From a row of a data set to its tokens and to which of them are to be learned.
Encode = Callable[[Row, str], tuple[np.ndarray, np.ndarray]]


@dataclass(frozen=True)
class Batch:
    """One micro-batch.

    Attributes:
        input_ids: (B, T); or, where documents are kept apart, all rows as one, (1, B * T).
        counted: of the same shape, which places learn: those whose next token is in the same document and,
            in a conversation, belongs to an answer.
        targets: of the same shape, that next token; 0 where there is none.
        cu_seqlens: borders of the documents, or None.
        tokens: how many tokens were read, padding included.
    """

    input_ids: Tensor
    counted: Tensor
    targets: Tensor
    cu_seqlens: Tensor | None
    tokens: int

    def to(self, device: torch.device) -> Batch:
        """The same on another device."""
        borders = None if self.cu_seqlens is None else self.cu_seqlens.to(device)
        ids, counted, targets = (t.to(device) for t in (self.input_ids, self.counted, self.targets))
        return Batch(ids, counted, targets, borders, self.tokens)


@dataclass
class _Current:
    """The document that a lane is in the middle of."""

    source: int
    before: dict[str, Any]
    tokens: np.ndarray
    learned: np.ndarray
    offset: int


class RowLane:
    """Fills rows from several sources, whose shares of the tokens follow their weights.

    Args:
        sources: the documents.
        weights: the share of each.
        encode: for each source, how a document becomes tokens.
        place: the lane's number, and how many there are.
        seed: of the documents' order.
        whole: documents are never cut in two.
    """

    def __init__(
        self,
        sources: Sequence[Documents],
        weights: Sequence[float],
        encode: Sequence[Encode],
        place: tuple[int, int],
        seed: Sequence[int],
        whole: bool,
    ) -> None:
        self.names = [source.name for source in sources]
        self.lanes = [source.lane(*place, seed) for source in sources]
        self.weights, self.encode, self.whole = weights, encode, whole
        self.taken = [0] * len(sources)
        self.current: _Current | None = None

    def next_row(self, length: int) -> tuple[np.ndarray, np.ndarray, list[int]]:
        """Tokens and which of them are learned, (T) each, and the lengths of the documents in the row."""
        tokens, learned = np.zeros(length, dtype=np.int64), np.zeros(length, dtype=bool)
        lengths: list[int] = []
        while (filled := sum(lengths)) < length:
            current = self._document()
            left = len(current.tokens) - current.offset
            if self.whole and current.offset == 0 and lengths and left > length - filled:
                lengths.append(length - filled)
                break
            count = min(left, length - filled)
            piece = slice(current.offset, current.offset + count)
            tokens[filled : filled + count] = current.tokens[piece]
            learned[filled : filled + count] = current.learned[piece]
            lengths.append(count)
            self.taken[current.source] += count
            current.offset = len(current.tokens) if self.whole else current.offset + count
        return tokens, learned, lengths

    def _document(self) -> _Current:
        while self.current is None or self.current.offset >= len(self.current.tokens):
            source = min(range(len(self.lanes)), key=lambda i: (self.taken[i] / self.weights[i], i))
            self._open(source, self.lanes[source].state(), 0)
        return self.current

    def _open(self, source: int, before: dict[str, Any], offset: int) -> None:
        row = self.lanes[source].next()
        tokens, learned = self.encode[source](row, f"a document of {self.names[source]}")
        self.current = _Current(source, before, tokens, learned, offset)

    def state(self) -> dict[str, Any]:
        """Where the lane stands, to the next token, as JSON values."""
        current = self.current
        return {
            "sources": [lane.state() for lane in self.lanes],
            "taken": list(self.taken),
            "current": None if current is None else [current.source, current.before, current.offset],
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Go to where a lane stood: the document it was in the middle of is read once more."""
        self.taken = list(state["taken"])
        for lane, saved in zip(self.lanes, state["sources"], strict=True):
            lane.restore(saved)
        if state["current"] is not None:
            source, before, offset = state["current"]
            self.lanes[source].restore(before)
            self._open(source, before, offset)


@dataclass(frozen=True)
class Layout:
    """How a stage's tokens are laid out.

    Attributes:
        batch_size: rows of a micro-batch.
        micro_batches: of a step, over all processes.
        sequence_length: tokens of a row.
        apart: documents do not see each other.
        rank: this process.
        ranks: how many there are.
    """

    batch_size: int
    micro_batches: int
    sequence_length: int
    apart: bool
    rank: int = 0
    ranks: int = 1

    @property
    def own(self) -> list[int]:
        """The micro-batches of this process."""
        return list(range(self.rank, self.micro_batches, self.ranks))

    @property
    def rows(self) -> int:
        """Rows of a step, over all processes."""
        return self.batch_size * self.micro_batches


State = dict[str, dict[str, Any]]


class Loader:
    """The micro-batches of this process, step by step; the next step's are made in the background.

    Args:
        layout: sizes, and which part is this process's.
        make_lane: makes one of ``layout.rows`` lanes.
    """

    def __init__(self, layout: Layout, make_lane: Callable[[int], RowLane]) -> None:
        self.layout = layout
        rows = range(layout.batch_size)
        self.lanes = {
            lane: make_lane(lane) for m in layout.own for lane in (m * layout.batch_size + r for r in rows)
        }
        self.state: State = self._state()
        self._pool = ThreadPoolExecutor(1, "batches")
        self._next: Future[tuple[list[Batch], State]] | None = None

    def next(self) -> list[Batch]:
        """The micro-batches of the next step, in the order of ``layout.own``.

        Raises:
            DataError: a document is damaged, or its file has changed.
        """
        future = self._next or self._pool.submit(self._read)
        batches, self.state = future.result()
        self._next = self._pool.submit(self._read)
        return batches

    def restore(self, state: State) -> None:
        """Go to where a loader of any number of processes stood."""
        assert self._next is None, "a loader that was read from is not restored"
        for lane, reader in self.lanes.items():
            reader.restore(state[str(lane)])
        self.state = self._state()

    def close(self) -> None:
        """End the work in the background."""
        self._pool.shutdown(wait=True, cancel_futures=True)

    def _state(self) -> State:
        return {str(lane): reader.state() for lane, reader in self.lanes.items()}

    def _read(self) -> tuple[list[Batch], State]:
        size = self.layout.batch_size
        batches = []
        for micro_batch in self.layout.own:
            lanes = [self.lanes[micro_batch * size + row] for row in range(size)]
            rows = [lane.next_row(self.layout.sequence_length) for lane in lanes]
            batches.append(make_batch(rows, self.layout.apart))
        return batches, self._state()


def make_batch(rows: Sequence[tuple[np.ndarray, np.ndarray, list[int]]], apart: bool) -> Batch:
    """A micro-batch of rows as :meth:`RowLane.next_row` gives them."""
    tokens_BT, learned_BT = (np.stack([row[part] for row in rows]) for part in (0, 1))  # pyright: ignore
    has_next = np.ones(tokens_BT.shape, dtype=bool)
    has_next[:, -1] = False
    if apart:
        for index, (_, _, lengths) in enumerate(rows):
            has_next[index, np.cumsum(lengths) - 1] = False
    targets = np.where(has_next, np.roll(tokens_BT, -1, axis=1), 0)
    counted = has_next & np.roll(learned_BT, -1, axis=1)
    shape = (1, -1) if apart else tokens_BT.shape
    ids, learned, following = (torch.from_numpy(x.reshape(shape)) for x in (tokens_BT, counted, targets))
    borders = np.cumsum([0, *(length for _, _, lengths in rows for length in lengths)]) if apart else None
    cu_seqlens = None if borders is None else torch.from_numpy(borders)
    return Batch(ids, learned, following, cu_seqlens, tokens_BT.size)

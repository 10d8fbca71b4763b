"""Documents to learn from, one by one: local files in any order, or a Hugging Face data set as it streams.

A run reads its documents in lanes: lane ``i`` of ``n`` gets every n-th document, on whichever GPU the lane
is, so that neither the number of GPUs nor a restart changes what comes next.
"""

from __future__ import annotations

import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from gearshift.errors import GearshiftError
from gearshift.train.recipe import DataSource

# A row of a data set; plain text is a row with the key ``text``.
Row = dict[str, Any]
BLOCK_BYTES = 1 << 22


class DataError(GearshiftError):
    """Documents to train on are missing, empty or not in a form that is understood."""


class DocumentLane(Protocol):
    """The documents of one lane, endlessly."""

    def next(self) -> Row:
        """The next document."""
        ...

    def state(self) -> dict[str, Any]:
        """Where the lane stands, as JSON values."""
        ...

    def restore(self, state: dict[str, Any]) -> None:
        """Go to where a lane stood."""
        ...


class Documents(Protocol):
    """Documents of one source."""

    @property
    def name(self) -> str:
        """What people call the source."""
        ...

    @property
    def digest(self) -> str:
        """Equal digests mean equal documents."""
        ...

    def lane(self, lane: int, lanes: int, seed: Sequence[int]) -> DocumentLane:
        """One of several lanes; together they get every document once before any comes again."""
        ...


class LocalDocuments(ABC):
    """Documents that can be read in any order.

    Attributes:
        name: what people call the source.
        digest: of the documents.
    """

    name: str
    digest: str

    @abstractmethod
    def __len__(self) -> int:
        """The number of documents."""

    @abstractmethod
    def read(self, index: int) -> Row:
        """One of them.

        Raises:
            DataError: it is damaged, or its file has changed since it was opened.
        """

    def lane(self, lane: int, lanes: int, seed: Sequence[int]) -> DocumentLane:
        """See :class:`Documents`; every epoch has an order of its own."""
        return _ShuffledLane(self, lane, lanes, tuple(seed))

    def __iter__(self) -> Iterator[Row]:
        """All documents, in their order."""
        return (self.read(index) for index in range(len(self)))


class _ShuffledLane:
    def __init__(self, documents: LocalDocuments, lane: int, lanes: int, seed: tuple[int, ...]) -> None:
        self.documents, self.place, self.lanes, self.seed = documents, lane, lanes, seed
        self.order: tuple[int, np.ndarray] | None = None

    def next(self) -> Row:
        epoch, index = divmod(self.place, len(self.documents))
        if self.order is None or self.order[0] != epoch:
            order = np.random.default_rng([*self.seed, epoch]).permutation(len(self.documents))
            self.order = (epoch, order)
        self.place += self.lanes
        return self.documents.read(int(self.order[1][index]))

    def state(self) -> dict[str, Any]:
        return {"place": self.place}

    def restore(self, state: dict[str, Any]) -> None:
        self.place = state["place"]


class MemoryDocuments(LocalDocuments):
    """Documents in memory.

    Args:
        name: what people call the source.
        rows: the documents.

    Raises:
        DataError: there are none.
    """

    def __init__(self, name: str, rows: Sequence[Row]) -> None:
        if not rows:
            raise DataError(f"{name} holds no documents; give others")
        self.name, self.rows = name, rows
        digest = hashlib.sha256()
        for row in rows:
            digest.update(json.dumps(row, default=str).encode())
        self.digest = digest.hexdigest()[:12]

    def __len__(self) -> int:
        return len(self.rows)

    def read(self, index: int) -> Row:
        """See :class:`LocalDocuments`."""
        return self.rows[index]


class JsonLinesDocuments(LocalDocuments):
    """The lines of a file, of which only their places are in memory.

    Args:
        path: the file.

    Raises:
        DataError: it is empty, or its last line is cut short.
    """

    def __init__(self, path: Path) -> None:
        self.path, self.name = path, str(path)
        self.stamp = _stamp(path)
        self.starts, self.size, self.digest = _index_lines(path)
        if not len(self.starts):
            raise DataError(f"{path} holds no documents; give others")
        self.read(len(self) - 1)

    def __len__(self) -> int:
        return len(self.starts)

    def read(self, index: int) -> Row:
        """See :class:`LocalDocuments`."""
        if _stamp(self.path) != self.stamp:
            raise DataError(
                f"{self.path} has changed since the run began; bring back the file that it began with and go "
                "on with --resume, or start a new run"
            )
        end = self.starts[index + 1] if index + 1 < len(self.starts) else self.size
        with self.path.open("rb") as file:
            file.seek(int(self.starts[index]))
            line = file.read(int(end - self.starts[index]))
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            last = "; it is the last one: the file may have been cut short" * (index + 1 == len(self))
            raise DataError(
                f"{self.path}, document {index + 1}: not valid JSON ({error}){last}; restore the file"
            ) from None
        if not isinstance(row, dict):
            raise DataError(f"{self.path}, document {index + 1}: expected a JSON object, found {row!r:.40}")
        return row


def _stamp(path: Path) -> tuple[int, int]:
    """What changes when a file is written to."""
    try:
        found = path.stat()
    except OSError as error:
        raise DataError(f"{path} cannot be read ({error.strerror}); bring it back") from None
    return found.st_size, found.st_mtime_ns


def _index_lines(path: Path) -> tuple[np.ndarray, int, str]:
    """Where lines that are not blank start, the file's size, and a digest of it."""
    starts, start, size, digest = [], 0, 0, hashlib.sha256()
    with path.open("rb") as file:
        for line in file:
            digest.update(line)
            size += len(line)
            if line.strip():
                starts.append(start)
            start = size
    return np.asarray(starts, dtype=np.int64), size, digest.hexdigest()[:12]


@dataclass(frozen=True)
class StreamedDocuments:
    """A Hugging Face data set, read while it is being fetched, in its own order.

    Attributes:
        name: its name, or a folder of data files.
        stream: the ``datasets.IterableDataset``.
        digest: of name, configuration and split: the rows themselves are not known beforehand.
    """

    name: str
    stream: Any
    digest: str

    @classmethod
    def open(cls, source: DataSource) -> StreamedDocuments:
        """Find the data set; rows are fetched when they are read.

        Raises:
            DataError: the extra ``train`` is not installed, or there is no such data set.
        """
        try:
            import datasets  # pyright: ignore[reportMissingImports]
        except ImportError:
            raise DataError(
                f"reading {source.name} takes the library 'datasets'; pip install 'gearshift[train]'"
            ) from None
        assert source.dataset is not None
        try:
            stream = datasets.load_dataset(source.dataset, source.config, split=source.split, streaming=True)
        except Exception as error:  # whatever its many readers and the network raise
            reason = " ".join(str(error).split())
            raise DataError(
                f"the data set {source.name} cannot be opened ({reason:.300}); check its name, 'config' and "
                "'split', and that it can be reached"
            ) from None
        key = f"{source.dataset}/{source.config}/{source.split}"
        return cls(source.name, stream, hashlib.sha256(key.encode()).hexdigest()[:12])

    def lane(self, lane: int, lanes: int, seed: Sequence[int]) -> DocumentLane:
        """See :class:`Documents`."""
        from datasets.distributed import split_dataset_by_node  # pyright: ignore[reportMissingImports]

        return _StreamedLane(self.name, split_dataset_by_node(self.stream, rank=lane, world_size=lanes))


class _StreamedLane:
    def __init__(self, name: str, stream: Any) -> None:  # noqa: ANN401 - of an optional library
        self.name, self.stream, self.epoch = name, stream, 0
        self.rows = iter(stream)

    def next(self) -> Row:
        for _ in range(2):
            row = next(self.rows, None)
            if row is not None:
                return row
            self.epoch += 1
            self.stream.set_epoch(self.epoch)
            self.rows = iter(self.stream)
        raise DataError(
            f"{self.name} has fewer documents than a step has sequences; give more documents, or a smaller "
            "batch_size or micro_batches"
        )

    def state(self) -> dict[str, Any]:
        return {"epoch": self.epoch, "stream": self.stream.state_dict()}

    def restore(self, state: dict[str, Any]) -> None:
        self.epoch = state["epoch"]
        self.stream.set_epoch(self.epoch)
        self.stream.load_state_dict(state["stream"])
        self.rows = iter(self.stream)


def column_of(row: Row, column: str, where: str) -> Any:  # noqa: ANN401 - text or messages
    """A column of a row.

    Raises:
        DataError: it has none of this name.
    """
    if column not in row:
        raise DataError(
            f"{where}: expected a value under \"{column}\", found {sorted(row)}; name it with 'column'"
        )
    return row[column]

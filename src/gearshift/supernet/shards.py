"""Writes safetensors files of bounded size, and the index that Transformers reads, one tensor at a time."""

from __future__ import annotations

import json
from collections.abc import Mapping
from io import BufferedIOBase
from pathlib import Path
from types import TracebackType

from torch import Tensor

from gearshift.files import write_json
from gearshift.supernet.tensor_files import TensorFiles, as_bytes, info_of
from gearshift.tensor_headers import DTYPE_BYTES, INDEX, WEIGHTS, TensorInfo

SHARD_BYTES = 4 * 10**9


class ShardWriter:
    """Writes tensors whose names, shapes and dtypes are known beforehand; holds none of them.

    Use it as a context manager. On entering, every file gets its header; then each tensor goes to its place,
    in any order; on leaving, unless there was an error, the files get their names and the index is written. A
    tensor larger than ``shard_bytes`` gets a file of its own.

    Args:
        directory: where; it is there already.
        infos: the tensors, in the order in which they are spread over the files.
        shard_bytes: data bytes of a file at most.
    """

    def __init__(self, directory: Path, infos: Mapping[str, TensorInfo], shard_bytes: int) -> None:
        self._directory = directory
        self._infos = dict(infos)
        self._shards = assign_shards(self._infos, shard_bytes)
        self._missing = set(self._infos)
        self._places: dict[str, tuple[Path, int]] = {}

    def __enter__(self) -> ShardWriter:
        for number, names in enumerate(self._shards):
            path = self._directory / _partial_name(number)
            header, starts = _header({name: self._infos[name] for name in names})
            path.write_bytes(header)
            self._places |= {name: (path, len(header) + start) for name, start in starts.items()}
        return self

    def write(self, name: str, tensor: Tensor) -> None:
        """Write a tensor from memory."""
        assert info_of(tensor) == self._infos[name], (name, info_of(tensor), self._infos[name])
        with self._open(name) as file:
            file.write(as_bytes(tensor).data)

    def copy(self, name: str, source: TensorFiles, source_name: str) -> None:
        """Write a tensor of ``source`` byte for byte.

        Raises:
            CheckpointError: it cannot be read.
        """
        assert source.infos[source_name] == self._infos[name], name
        with self._open(name) as file:
            source.copy_to(source_name, file)

    def _open(self, name: str) -> BufferedIOBase:
        self._missing.remove(name)
        path, start = self._places[name]
        file = path.open("r+b")
        file.seek(start)
        return file

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None:
            assert not self._missing, sorted(self._missing)
            self._name_shards()

    def _name_shards(self) -> None:
        """Names that load are given last, when everything is there."""
        count = len(self._shards)
        if count == 1:
            (self._directory / _partial_name(0)).rename(self._directory / WEIGHTS)
            return
        weight_map = {}
        for number, names in enumerate(self._shards):
            final = f"model-{number + 1:05}-of-{count:05}.safetensors"
            (self._directory / _partial_name(number)).rename(self._directory / final)
            weight_map |= dict.fromkeys(names, final)
        total = sum(info.nbytes for info in self._infos.values())
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
        write_json(self._directory / INDEX, index)


def assign_shards(infos: Mapping[str, TensorInfo], shard_bytes: int) -> list[list[str]]:
    """The names of each file's tensors, in order; at least one file, if need be empty."""
    shards: list[list[str]] = [[]]
    size = 0
    for name, info in infos.items():
        if shards[-1] and size + info.nbytes > shard_bytes:
            shards.append([])
            size = 0
        shards[-1].append(name)
        size += info.nbytes
    return shards


def _header(infos: Mapping[str, TensorInfo]) -> tuple[bytes, dict[str, int]]:
    """A file's first bytes, and where each tensor starts behind them."""
    fields: dict[str, object] = {"__metadata__": {"format": "pt"}}
    starts, end = {}, 0
    # The widest numbers first, so that every tensor starts at a multiple of its numbers' width, as readers
    # need; then by name: bytes and digests are the same as when the format's own library writes the file.
    order = {dtype: -rank for rank, dtype in enumerate(DTYPE_BYTES)}
    for name in sorted(infos, key=lambda name: (order[infos[name].dtype], name)):
        info, starts[name] = infos[name], end
        end += info.nbytes
        fields[name] = {
            "dtype": info.dtype,
            "shape": info.shape,
            "data_offsets": (starts[name], end),
        }
    text = json.dumps(fields, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text, starts


def _partial_name(shard: int) -> str:
    return f"shard-{shard:05}.partial"

"""Which tensors a model directory holds, by the headers of its safetensors files; without torch or values.

Nothing in a header or an index is believed before it is checked, so that a hostile file costs neither much
time nor much memory: offsets are whole and inside their file, an index names files beside it, and every
tensor lies where the index says.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from gearshift.errors import CheckpointError, FileFormatError
from gearshift.files import read_json

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
# Some 100,000 tensors in one file. The format allows 100 MB, which read as JSON could take gigabytes.
MAX_HEADER_BYTES = 1 << 24
# In the order in which the format's own library writes them from the last to the first.
DTYPE_BYTES = {
    **dict.fromkeys(("BOOL", "U8", "I8", "F8_E5M2", "F8_E4M3", "F8_E8M0"), 1),
    **dict.fromkeys(("I16", "U16", "F16", "BF16"), 2),
    **dict.fromkeys(("I32", "U32", "F32"), 4),
    **dict.fromkeys(("C64", "F64", "I64", "U64"), 8),
}
# How a zip file starts, and a pickle of protocol 2 to 5.
PICKLES = (b"PK\3\4", *(bytes((0x80, protocol)) for protocol in range(2, 6)))
LFS_POINTER = b"version "
FLOATING = ("F64", "F32", "F16", "BF16")


@dataclass(frozen=True)
class TensorInfo:
    """What a header says of one tensor.

    Attributes:
        shape: its sizes.
        dtype: its type by its safetensors name, such as ``F32`` or ``BF16``.
    """

    shape: tuple[int, ...]
    dtype: str

    @property
    def numel(self) -> int:
        """How many numbers it has."""
        return prod(self.shape)

    @property
    def nbytes(self) -> int:
        """How many bytes they take."""
        return self.numel * DTYPE_BYTES[self.dtype]


@dataclass(frozen=True)
class StoredTensor:
    """Where a tensor is stored.

    Attributes:
        info: its shape and dtype.
        path: the file.
        start: the position of its first byte in the file.
    """

    info: TensorInfo
    path: Path
    start: int


def read_directory(directory: Path) -> dict[str, StoredTensor]:
    """Every tensor of a model directory, by name.

    Raises:
        CheckpointError: a file is missing, damaged or no safetensors file, or the index does not fit them.
    """
    index = _read_index(directory)
    stored: dict[str, StoredTensor] = {}
    for path in _files(directory, index):
        entries = read_header(path)
        for name in stored.keys() & entries.keys():
            raise CheckpointError(
                f"{directory}: {name} is in {stored[name].path.name} and in {path.name}; "
                "expected it once: restore the files"
            )
        stored |= entries
    if index is not None:
        _check_index(directory / INDEX, index, {name: entry.path.name for name, entry in stored.items()})
    return stored


def _check_index(path: Path, index: dict[str, str], found: dict[str, str]) -> None:
    for name in sorted(index.keys() | found.keys()):
        if index.get(name) != found.get(name):
            said, true = index.get(name, "no file"), found.get(name, "none")
            raise CheckpointError(
                f"{path} has {name} in {said}, but it is in {true}; restore the index and the files"
            )


def weight_files(directory: Path) -> list[Path]:
    """The weight files that a model directory names.

    Raises:
        CheckpointError: one is missing, or the index points outside the directory.
    """
    return _files(directory, _read_index(directory))


def _files(directory: Path, index: dict[str, str] | None) -> list[Path]:
    names = [WEIGHTS] if index is None else sorted(set(index.values()))
    if index is None and not (directory / WEIGHTS).is_file():
        _explain_missing(directory)
    return [file_inside(directory, name) for name in names]


def _explain_missing(directory: Path) -> None:
    """Say what stands where ``model.safetensors`` should be, if it is something that is known.

    Raises:
        CheckpointError: it is shards without their index, or pickles.
    """
    if shards := sorted(path.name for path in directory.glob("model-*-of-*.safetensors")):
        raise CheckpointError(
            f"{directory / INDEX} is missing, which says what is in {shards[0]} and the other shards; "
            "restore it"
        )
    if pickles := sorted(path.name for path in directory.glob("pytorch_model*.bin")):
        raise CheckpointError(
            f"{directory} has its weights in {pickles[0]}, a pickle, which is never read: it can run "
            f"programs. Take {WEIGHTS} or, if you trust it, load it in Transformers and save it again"
        )


def _read_index(directory: Path) -> dict[str, str] | None:
    """Tensor name -> file name; None where one file holds everything."""
    path = directory / INDEX
    # The one file comes first where there are both, as it does for Transformers.
    if (directory / WEIGHTS).is_file() or not path.is_file():
        return None
    weight_map = read_json_object(file_inside(directory, INDEX)).get("weight_map")
    if not isinstance(weight_map, dict):
        raise CheckpointError(f"{path} has no weight_map; restore it or convert again")
    for name in weight_map.values():
        if not isinstance(name, str) or Path(name).name != name or "\0" in name:
            raise CheckpointError(
                f"{path} names {name!r} in its weight_map; expected a file in the same directory"
            )
    return weight_map


def file_inside(directory: Path, name: str) -> Path:
    """The path of a file of the directory; a link may point to another file of it, or into a hub's cache.

    Raises:
        CheckpointError: it is not there, or a link leads elsewhere.
    """
    path = directory / name
    if not path.is_file():
        raise CheckpointError(f"{path} is missing; restore it or make the directory again")
    target, home = path.resolve(), directory.resolve()
    # A hub's cache keeps MODEL/blobs/<digest>, and links to it in MODEL/snapshots/<revision>/.
    blobs = [folder.parent / "blobs" for folder in home.parents if folder.name == "snapshots"]
    if not any(target.is_relative_to(place) for place in (home, *blobs)):
        raise CheckpointError(
            f"{path} is a link to {target}, outside the directory; expected the file itself: copy it there"
        )
    return path


def read_json_object(path: Path) -> dict[str, Any]:
    """A JSON file of a model directory.

    Raises:
        CheckpointError: the file is missing, or holds no JSON object.
    """
    try:
        content = read_json(path)
    except FileFormatError as error:
        raise CheckpointError(str(error)) from None
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} holds no JSON object; restore it or make the directory again")
    return content


def read_header(path: Path) -> dict[str, StoredTensor]:
    """The tensors of one safetensors file, in the order of their bytes.

    Raises:
        CheckpointError: the file is missing, truncated, or no safetensors file.
    """
    try:
        header, data_start, data_bytes = _read_checked(path)
        return dict(_stored_tensors(path, header, data_start, data_bytes))
    except FileNotFoundError:
        raise CheckpointError(f"{path} is missing; restore it or make the directory again") from None
    except (SafetensorError, OSError, ValueError, RecursionError) as error:
        raise CheckpointError(
            f"{path} is truncated or damaged ({error}); restore it or make the directory again"
        ) from None


def _read_checked(path: Path) -> tuple[dict[str, Any], int, int]:
    """The header, the position of the first data byte, and the number of data bytes."""
    size = path.stat().st_size
    with path.open("rb") as file:
        start = file.read(8)
        length = int.from_bytes(start, "little")
        if len(start) < 8 or length > min(size - 8, MAX_HEADER_BYTES):
            hint = "; it starts as a pickle does, which is never read" * start.startswith(PICKLES)
            hint += "; it is Git LFS's pointer to the file: git lfs pull gets it" * (start == LFS_POINTER)
            raise ValueError(
                f"a header of {length} bytes in a file of {size}, and {MAX_HEADER_BYTES} at most{hint}"
            )
        text = file.read(length)
    # The format's own library refuses what is not made like a header, before Python makes objects of it.
    with safe_open(path, framework="np"):
        pass
    header = json.loads(text, object_pairs_hook=_once)
    if not isinstance(header, dict):
        raise ValueError("its header is no JSON object")
    header.pop("__metadata__", None)
    return header, 8 + length, size - 8 - length


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    fields = dict(pairs)
    if len(fields) < len(pairs):
        (name, _), *_ = Counter(name for name, _ in pairs).most_common(1)
        raise ValueError(f"its header has {name} more than once")
    return fields


def _stored_tensors(
    path: Path, header: dict[str, Any], data_start: int, data_bytes: int
) -> Iterator[tuple[str, StoredTensor]]:
    """Tensors in the order of their bytes, which follow each other without gaps up to the file's end."""
    spans = sorted((*_span(name, entry), name) for name, entry in header.items())
    expected = 0
    for start, end, name in spans:
        info = TensorInfo(tuple(header[name]["shape"]), header[name]["dtype"])
        if start != expected or end - start != info.nbytes:
            raise ValueError(
                f"{name}, {info.dtype} {list(info.shape)}, is at {start} to {end}; "
                f"expected {expected} to {expected + info.nbytes}"
            )
        yield name, StoredTensor(info, path, data_start + start)
        expected = end
    if expected != data_bytes:
        raise ValueError(f"its tensors take {expected} bytes, and it has {data_bytes}")


def _span(name: str, entry: object) -> tuple[int, int]:
    """The offsets of one entry, if it is made as the format says."""
    if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
        raise ValueError(f"{name} has {entry!r:.80}; expected dtype, shape and data_offsets")
    if not isinstance(entry["dtype"], str) or entry["dtype"] not in DTYPE_BYTES:
        raise ValueError(f"{name} has dtype {entry['dtype']!r}; expected one of {', '.join(DTYPE_BYTES)}")
    offsets, shape = entry["data_offsets"], entry["shape"]
    if not _are_counts(shape) or not _are_counts(offsets) or len(offsets) != 2:
        raise ValueError(f"{name} has shape {shape!r:.80}, offsets {offsets!r:.80}; expected whole numbers")
    return offsets[0], offsets[1]


def _are_counts(values: object) -> bool:
    return isinstance(values, list) and all(type(value) is int and value >= 0 for value in values)

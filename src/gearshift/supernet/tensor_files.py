"""The values of a model directory's tensors, one at a time.

Files are read, not mapped, so that resident memory stays at one tensor, or at one block for a copy.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from io import BufferedIOBase
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from gearshift.errors import CheckpointError
from gearshift.tensor_headers import StoredTensor, TensorInfo, read_directory

# Stays in a core's cache between being read, checked and written.
BLOCK_BYTES = 1 << 18
TORCH_DTYPES = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E8M0": torch.float8_e8m0fnu,
    "I16": torch.int16,
    "U16": torch.uint16,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I32": torch.int32,
    "U32": torch.uint32,
    "F32": torch.float32,
    "I64": torch.int64,
    "U64": torch.uint64,
    "F64": torch.float64,
    "C64": torch.complex64,
}
DTYPE_NAMES = {dtype: name for name, dtype in TORCH_DTYPES.items()}
# Bytes of a number, and its bits at the least magnitude that is infinite or not a number.
NOT_FINITE = {
    "F8_E5M2": (1, 0x7C),
    "F8_E4M3": (1, 0x7F),
    "F16": (2, 0x7C00),
    "BF16": (2, 0x7F80),
    "F32": (4, 0x7F800000),
    "C64": (4, 0x7F800000),
    "F64": (8, 0x7FF0000000000000),
}


class TensorFiles:
    """Read access to every tensor of a model directory, whether it is in one file or in shards.

    Args:
        directory: the directory.
        extra: one whose tensors are added.

    Attributes:
        directory: the directory.
        infos: shape and dtype of every tensor, by name.

    Raises:
        CheckpointError: a file is missing, damaged or no safetensors file, or the index does not fit them.
    """

    def __init__(self, directory: Path | str, extra: Path | None = None) -> None:
        self.directory = Path(directory)
        self._stored = read_directory(self.directory)
        for name, stored in (read_directory(extra) if extra is not None else {}).items():
            if self._stored.setdefault(name, stored) is not stored:
                raise CheckpointError(f"{extra} has {name}, which {self.directory} has, too; restore both")
        self.infos: dict[str, TensorInfo] = {name: stored.info for name, stored in self._stored.items()}

    def path(self, name: str) -> Path:
        """The file that holds a tensor."""
        return self._stored[name].path

    def prefetch(self, names: Iterable[str]) -> None:
        """Ask the system to read these tensors ahead, while something else is done; a hint, nothing more."""
        if not hasattr(os, "posix_fadvise"):
            return
        for stored in (self._stored[name] for name in names):
            with stored.path.open("rb") as file:
                os.posix_fadvise(file.fileno(), stored.start, stored.info.nbytes, os.POSIX_FADV_WILLNEED)

    def read(self, name: str) -> Tensor:
        """The tensor, in memory of its own.

        Raises:
            CheckpointError: it holds an infinity or what is not a number, or the file shrank.
        """
        stored = self._stored[name]
        values = torch.empty(stored.info.nbytes, dtype=torch.uint8)
        with self._open(stored) as file:
            for block in _blocks(values.numpy()):
                self._fill(block, name, stored, file)
        return values.view(TORCH_DTYPES[stored.info.dtype]).view(stored.info.shape)

    def copy_to(self, name: str, target: BufferedIOBase) -> None:
        """Write the tensor's bytes, as they are, to ``target``.

        Raises:
            CheckpointError: it holds an infinity or what is not a number, or the file shrank.
        """
        stored = self._stored[name]
        left, buffer = stored.info.nbytes, np.empty(BLOCK_BYTES, np.uint8)
        with self._open(stored) as file:
            while left:
                block = buffer[:left]
                self._fill(block, name, stored, file)
                target.write(block.data)
                left -= len(block)

    @staticmethod
    def _open(stored: StoredTensor) -> BufferedIOBase:
        file = stored.path.open("rb")
        file.seek(stored.start)
        return file

    @staticmethod
    def _fill(block: np.ndarray, name: str, stored: StoredTensor, file: BufferedIOBase) -> None:
        if file.readinto(block.data) < len(block):
            raise CheckpointError(f"{stored.path} ends in the middle of {name}; restore it")
        if not all_finite(block, stored.info.dtype):
            raise CheckpointError(
                f"{stored.path}: {name} holds infinities or what is not a number (NaN); restore the file, or "
                "take another checkpoint"
            )


def _blocks(values: np.ndarray) -> Iterator[np.ndarray]:
    for start in range(0, len(values), BLOCK_BYTES):
        yield values[start : start + BLOCK_BYTES]


def all_finite(values: np.ndarray, dtype: str) -> bool:
    """Whether bytes that hold numbers of this type hold neither infinities nor NaN.

    Read as integers, floating-point numbers of one sign stand in the order of their magnitudes, infinity and
    NaN last: two maxima, signed for the positive and unsigned for the negative ones, tell at memory speed.
    """
    if dtype not in NOT_FINITE:
        return True
    width, bits = NOT_FINITE[dtype]
    sign = 1 << (8 * width - 1)
    return all(
        block.view(f"<i{width}").max() < bits and block.view(f"<u{width}").max() < sign + bits
        for block in _blocks(values)
    )


def as_bytes(tensor: Tensor) -> np.ndarray:
    """A view of a tensor's bytes; of a copy where its numbers do not follow each other."""
    return tensor.detach().contiguous().view(-1).view(torch.uint8).numpy()


def info_of(tensor: Tensor) -> TensorInfo:
    """Shape and dtype of a tensor in memory."""
    return TensorInfo(tuple(tensor.shape), DTYPE_NAMES[tensor.dtype])

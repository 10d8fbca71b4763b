"""Hidden states of all windows in a file, of which only the batch in use is in memory.

Shape letters: N windows, T tokens of a window, D hidden size.
"""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import ExitStack
from pathlib import Path

import torch
from torch import Tensor

from gearshift.files import atomic_file
from gearshift.supernet.tensor_files import as_bytes
from gearshift.train.calibrate.settings import CalibrationError


def write_activations(batches: Iterable[tuple[Tensor, ...]], paths: tuple[Path, ...]) -> None:
    """Write the tensors of each batch to the ends of as many files; they appear whole, or not at all."""
    with ExitStack() as stack:
        partials = [stack.enter_context(atomic_file(path)) for path in paths]
        with ExitStack() as closing:
            files = [closing.enter_context(partial.open("wb")) for partial in partials]
            for batch in batches:
                for file, tensor in zip(files, batch, strict=True):
                    file.write(as_bytes(tensor.cpu()).data)


def map_activations(path: Path, shape: tuple[int, int, int], dtype: torch.dtype) -> Tensor:
    """The file as a tensor (N, T, D) whose parts are read when they are used.

    Raises:
        CalibrationError: the file is missing or of another size.
    """
    count = shape[0] * shape[1] * shape[2]
    size = path.stat().st_size if path.is_file() else None
    if size != count * dtype.itemsize:
        found = "is missing" if size is None else f"has {size} bytes"
        raise CalibrationError(
            f"{path} {found}; expected {count * dtype.itemsize} bytes of hidden states: "
            f"remove {path.parents[1]} and start again"
        )
    return torch.from_file(str(path), shared=False, size=count, dtype=dtype).view(shape)

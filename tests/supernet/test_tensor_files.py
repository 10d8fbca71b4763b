"""Reading tensors one by one, compared with the format's own library."""

from __future__ import annotations

import io
import math
import struct
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor

import gearshift.supernet.tensor_files as tensor_files
from gearshift.errors import CheckpointError
from gearshift.supernet.tensor_files import (
    BLOCK_BYTES,
    DTYPE_NAMES,
    NOT_FINITE,
    TORCH_DTYPES,
    TensorFiles,
    all_finite,
    as_bytes,
)
from gearshift.tensor_headers import DTYPE_BYTES, FLOATING

WEIGHTS = "model.safetensors"
kinds = st.lists(
    st.tuples(st.sampled_from(list(TORCH_DTYPES.values())), st.lists(st.integers(0, 4), max_size=3)),
    max_size=6,
)


def random_tensor(dtype: torch.dtype, shape: list[int]) -> Tensor:
    return (torch.rand(shape) * 100).to(torch.uint8).to(dtype)


def test_the_tables_of_dtypes_agree():
    assert TORCH_DTYPES.keys() == DTYPE_BYTES.keys()
    assert all(dtype.itemsize == DTYPE_BYTES[name] for name, dtype in TORCH_DTYPES.items())
    assert len(DTYPE_NAMES) == len(TORCH_DTYPES)
    assert NOT_FINITE.keys() >= set(FLOATING)


@given(kinds=kinds)
def test_it_reads_what_the_formats_own_library_reads(
    kinds: list[tuple[torch.dtype, list[int]]], tmp_path_factory: pytest.TempPathFactory
):
    directory = tmp_path_factory.mktemp("read")
    tensors = {f"t{index}": random_tensor(*kind) for index, kind in enumerate(kinds)}
    save_file(tensors, directory / WEIGHTS)
    expected, files = load_file(directory / WEIGHTS), TensorFiles(directory)
    assert files.infos.keys() == expected.keys()
    for name, tensor in expected.items():
        assert files.infos[name].shape == tensor.shape
        assert files.infos[name].nbytes == tensor.nbytes
        given = files.read(name)
        assert (given.dtype, given.shape) == (tensor.dtype, tensor.shape)
        assert as_bytes(given).tobytes() == as_bytes(tensor).tobytes()
        copied = io.BytesIO()
        files.copy_to(name, copied)
        assert copied.getvalue() == as_bytes(tensor).tobytes()


def test_tensors_of_many_blocks_are_whole(tmp_path: Path):
    tensors = {"a": torch.randn(3 * BLOCK_BYTES // 4 + 1), "b": torch.randn(BLOCK_BYTES // 2).bfloat16()}
    save_file(tensors, tmp_path / WEIGHTS)
    files = TensorFiles(tmp_path)
    for name, tensor in tensors.items():
        assert torch.equal(files.read(name), tensor)
        copied = io.BytesIO()
        files.copy_to(name, copied)
        assert copied.getvalue() == as_bytes(tensor).tobytes()


def test_what_is_read_does_not_change_with_the_file(tmp_path: Path):
    save_file({"a": torch.ones(4)}, tmp_path / WEIGHTS)
    tensor = TensorFiles(tmp_path).read("a")
    (tmp_path / WEIGHTS).write_bytes(bytes(200))
    assert torch.equal(tensor, torch.ones(4))


@pytest.mark.parametrize("dtype", ["F16", "BF16", "F8_E5M2", "F8_E4M3"])
def test_the_finite_check_knows_every_bit_pattern(dtype: str):
    count = 1 << (8 * DTYPE_BYTES[dtype])
    patterns = np.arange(count, dtype=f"<u{DTYPE_BYTES[dtype]}")
    expected = torch.from_numpy(patterns.view(np.uint8)).view(TORCH_DTYPES[dtype]).float().isfinite()
    given = [all_finite(pattern.view(np.uint8), dtype) for pattern in np.split(patterns, count)]
    assert given == expected.tolist()


@pytest.mark.parametrize("dtype", ["F32", "F64"])
@given(bits=st.integers(0, (1 << 64) - 1))
def test_the_finite_check_of_wide_numbers(dtype: str, bits: int):
    values = np.frombuffer(struct.pack("<Q", bits), np.uint8)
    given = torch.from_numpy(values.copy()).view(TORCH_DTYPES[dtype])
    assert all_finite(values, dtype) == bool(given.isfinite().all())


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("wrong", [math.nan, -math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("place", [0, BLOCK_BYTES, -1])
def test_a_number_that_is_not_finite_is_refused_with_its_place(
    dtype: torch.dtype, wrong: float, place: int, tmp_path: Path
):
    largest = torch.finfo(dtype).max
    tensor = torch.full((BLOCK_BYTES + 8,), largest, dtype=dtype)
    save_file({"good": tensor, "bad": tensor.index_fill(0, torch.tensor(place), wrong)}, tmp_path / WEIGHTS)
    files = TensorFiles(tmp_path)
    assert torch.equal(files.read("good"), tensor)
    for read in (files.read, lambda name: files.copy_to(name, io.BytesIO())):
        with pytest.raises(CheckpointError, match=r"model.safetensors: bad holds infinities or .* \(NaN\)"):
            read("bad")


def test_a_file_that_shrinks_after_its_header_was_read(tmp_path: Path):
    save_file({"a": torch.ones(4)}, tmp_path / WEIGHTS)
    files = TensorFiles(tmp_path)
    content = (tmp_path / WEIGHTS).read_bytes()
    (tmp_path / WEIGHTS).write_bytes(content[:-1])
    for read in (files.read, lambda name: files.copy_to(name, io.BytesIO())):
        with pytest.raises(CheckpointError, match="ends in the middle of a"):
            read("a")


def test_nothing_is_mapped_into_memory():
    """A mapped file counts as resident memory, and kills the process when it shrinks."""
    assert "mmap" not in Path(tensor_files.__file__).read_text()


def test_an_extra_directorys_tensors_are_added_and_none_is_there_twice(tmp_path: Path):
    for folder, names in {"text": ("a", "b"), "vision": ("c",), "again": ("b",)}.items():
        (tmp_path / folder).mkdir()
        save_file({name: torch.ones(2) for name in names}, tmp_path / folder / WEIGHTS)
    files = TensorFiles(tmp_path / "text", tmp_path / "vision")
    assert (list(files.infos), files.path("c").parent.name) == (["a", "b", "c"], "vision")
    with pytest.raises(CheckpointError, match="again has b, which .*text has, too"):
        TensorFiles(tmp_path / "text", tmp_path / "again")

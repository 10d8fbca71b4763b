"""Files of bounded size, and the index over them."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor

from gearshift.supernet.shards import ShardWriter, assign_shards
from gearshift.supernet.tensor_files import TORCH_DTYPES, info_of
from gearshift.tensor_headers import TensorInfo


def write(
    directory: Path, tensors: dict[str, Tensor], shard_bytes: int = 1 << 20, order: list[str] | None = None
) -> None:
    with ShardWriter(directory, {name: info_of(t) for name, t in tensors.items()}, shard_bytes) as writer:
        for name in order or tensors:
            writer.write(name, tensors[name])


def read(directory: Path) -> dict[str, Tensor]:
    return {name: t for path in directory.glob("*.safetensors") for name, t in load_file(path).items()}


def test_little_makes_one_file_without_an_index(tmp_path: Path):
    write(tmp_path, {"a": torch.ones(3), "b": torch.zeros(2, dtype=torch.bfloat16)})
    assert [path.name for path in tmp_path.iterdir()] == ["model.safetensors"]
    assert read(tmp_path)["b"].dtype == torch.bfloat16


@given(sizes=st.lists(st.integers(0, 12), min_size=1, max_size=12), bound=st.integers(4, 40))
def test_shards_are_bounded_and_the_index_is_right(
    sizes: list[int], bound: int, tmp_path_factory: pytest.TempPathFactory
):
    directory = tmp_path_factory.mktemp("shards")
    tensors = {f"t{index}": torch.full((size,), float(index)) for index, size in enumerate(sizes)}
    write(directory, tensors, bound)
    given = read(directory)
    assert given.keys() == tensors.keys()
    assert all(torch.equal(given[name], tensor) for name, tensor in tensors.items())
    shards = {path.name: load_file(path) for path in directory.glob("*.safetensors")}
    for shard in shards.values():
        assert len(shard) == 1 or sum(tensor.nbytes for tensor in shard.values()) <= bound
    if len(shards) > 1:
        index = json.loads((directory / "model.safetensors.index.json").read_text())
        assert index["metadata"]["total_size"] == 4 * sum(sizes)
        assert index["weight_map"] == {name: file for file, shard in shards.items() for name in shard}
        count = len(shards)
        assert set(shards) == {f"model-{n + 1:05}-of-{count:05}.safetensors" for n in range(count)}


kinds = st.lists(
    st.tuples(st.sampled_from(list(TORCH_DTYPES.values())), st.lists(st.integers(0, 3), max_size=3)),
    max_size=9,
)


@given(kinds=kinds, seed=st.integers(0, 9))
def test_a_file_is_byte_for_byte_what_the_formats_own_library_writes(
    kinds: list[tuple[torch.dtype, list[int]]], seed: int, tmp_path_factory: pytest.TempPathFactory
):
    directory = tmp_path_factory.mktemp("shards")
    tensors = {f"t{i}ä": (torch.rand(s) * 9).to(torch.uint8).to(dtype) for i, (dtype, s) in enumerate(kinds)}
    order = list(tensors)
    random.Random(seed).shuffle(order)
    write(directory, tensors, order=order)
    save_file(tensors, directory / "expected", metadata={"format": "pt"})
    assert (directory / "model.safetensors").read_bytes() == (directory / "expected").read_bytes()


def test_the_order_of_names_decides_the_shards():
    infos = {f"t{index}": TensorInfo((size,), "U8") for index, size in enumerate((3, 3, 9, 1, 1))}
    assert assign_shards(infos, 4) == [["t0"], ["t1"], ["t2"], ["t3", "t4"]]
    assert assign_shards({}, 4) == [[]]


def test_tensors_that_share_memory_are_each_written(tmp_path: Path):
    whole = torch.arange(6.0).view(2, 3)
    tensors = {"whole": whole, "again": whole, "row": whole[1], "turned": whole.T}
    write(tmp_path, tensors)
    given = read(tmp_path)
    assert all(torch.equal(given[name], tensor) for name, tensor in tensors.items())


def test_an_error_leaves_no_file_that_loads(tmp_path: Path):
    infos = {name: info_of(torch.ones(2)) for name in "abcd"}
    with pytest.raises(KeyboardInterrupt), ShardWriter(tmp_path, infos, 8) as writer:
        for name in "dcba":
            writer.write(name, torch.ones(2))
        raise KeyboardInterrupt
    assert {path.suffix for path in tmp_path.iterdir()} == {".partial"}


@pytest.mark.parametrize("given", [torch.ones(3), torch.ones(2, 1), torch.ones(2).half()])
def test_another_shape_or_dtype_than_was_said_is_our_mistake(given: Tensor, tmp_path: Path):
    with pytest.raises(AssertionError), ShardWriter(tmp_path, {"a": TensorInfo((2,), "F32")}, 8) as writer:
        writer.write("a", given)


def test_a_tensor_that_never_came_is_our_mistake(tmp_path: Path):
    with pytest.raises(AssertionError, match="'b'"), ShardWriter(tmp_path, {"b": TensorInfo((), "F32")}, 8):
        pass

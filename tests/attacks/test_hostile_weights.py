"""Weight files made to run code, to fill the memory, to read elsewhere or to be read wrongly: all refused."""

from __future__ import annotations

import io
import json
import os
import pickle
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

import gearshift
from gearshift.cli.info import run as info
from gearshift.convert import convert_teacher
from gearshift.errors import GearshiftError
from gearshift.supernet import load_supernet

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
SECONDS = 2.0
MEGABYTES = 100


class RunsCode:
    """Unpickled, it makes a file."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[str, str]]:
        return open, (str(self.marker), "w")


def a_pickle(directory: Path) -> None:
    (directory / WEIGHTS).write_bytes(pickle.dumps(RunsCode(directory.parent / "ran")))


def a_torch_file(directory: Path) -> None:
    buffer = io.BytesIO()
    torch.save({"a": RunsCode(directory.parent / "ran")}, buffer)
    (directory / WEIGHTS).write_bytes(buffer.getvalue())


def with_header(text: bytes | object, data: bytes = b"", length: int | None = None) -> Callable[[Path], None]:
    """A file with this header, which may lie about its length."""
    header = text if isinstance(text, bytes) else json.dumps(text).encode()

    def write(directory: Path) -> None:
        start = (len(header) if length is None else length).to_bytes(8, "little")
        (directory / WEIGHTS).write_bytes(start + header + data)

    return write


def sparse(length: int, size: int) -> Callable[[Path], None]:
    """A file that claims a header of ``length`` bytes, and seems to have it, but takes no room."""

    def write(directory: Path) -> None:
        (directory / WEIGHTS).write_bytes(length.to_bytes(8, "little") + b'{"a":')
        os.truncate(directory / WEIGHTS, size)

    return write


def entry(begin: Any, end: Any, shape: Any = (2,), dtype: Any = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


def with_index(weight_map: object) -> Callable[[Path], None]:
    def write(directory: Path) -> None:
        (directory / WEIGHTS).rename(directory / "shard.safetensors")
        (directory / INDEX).write_text(json.dumps({"weight_map": weight_map}))

    return write


def an_index_to_elsewhere(name: str) -> Callable[[Path], None]:
    """The file that is named outside the directory is a good one."""

    def write(directory: Path) -> None:
        shutil.move(directory / WEIGHTS, directory.parent / "elsewhere.safetensors")
        path = name.format(parent=directory.parent)
        (directory / INDEX).write_text(json.dumps({"weight_map": {"model.norm.weight": path}}))

    return write


def a_link(name: str) -> Callable[[Path], None]:
    """A good file, but outside the directory: what it links to might be somebody's secret."""

    def write(directory: Path) -> None:
        shutil.move(directory / name, directory.parent / "secret")
        (directory / name).symlink_to(directory.parent / "secret")

    return write


def a_link_to_itself(directory: Path) -> None:
    (directory / WEIGHTS).unlink()
    (directory / WEIGHTS).symlink_to(directory / WEIGHTS)


def a_pipe(directory: Path) -> None:
    """Opening it would wait for ever."""
    (directory / WEIGHTS).unlink()
    os.mkfifo(directory / WEIGHTS)


def a_folder(directory: Path) -> None:
    (directory / WEIGHTS).unlink()
    (directory / WEIGHTS).mkdir()


def a_raw_index(content: bytes) -> Callable[[Path], None]:
    def write(directory: Path) -> None:
        (directory / WEIGHTS).unlink()
        (directory / INDEX).write_bytes(content)

    return write


def the_same_tensor_twice(directory: Path) -> None:
    """Which of the two is meant?"""
    (directory / WEIGHTS).unlink()
    for name in ("a", "b"):
        save_file({"model.norm.weight": torch.ones(32)}, directory / f"{name}.safetensors")
    weight_map = {"model.norm.weight": "a.safetensors", "other": "b.safetensors"}
    (directory / INDEX).write_text(json.dumps({"weight_map": weight_map}))


GOOD = {"a": entry(0, 8), "b": entry(8, 16)}
TWICE = b'{"a":%s,"a":%s}' % (json.dumps(GOOD["a"]).encode(), json.dumps(GOOD["a"]).encode())
MILLIONS = 3_000_000
HOSTILE: dict[str, Callable[[Path], None]] = {
    "a pickle": a_pickle,
    "a file of torch.save": a_torch_file,
    "a header of 9 EB": with_header(b"{}", length=2**63 - 1),
    "a header of 2^64 - 1 bytes": with_header(b"{}", length=2**64 - 1),
    "a header of 1 TB in a sparse file": sparse(2**40, 2**41),
    "a header of 99 MB in a sparse file": sparse(99_000_000, 10**9),
    "a header of 16 MB in a sparse file": sparse(2**24, 10**9),
    "a header of empty lists": with_header(b'{"a":[' + b"[]," * MILLIONS + b"[]]}"),
    "a header of empty objects": with_header(b'{"a":{},' + b'"b":{},' * (MILLIONS // 2) + b'"c":{}}'),
    "a deep header of lists": with_header(b"[" * 1_000_000 + b"]" * 1_000_000),
    "a deep header of objects": with_header(b'{"a":' * 1_000_000 + b"1" + b"}" * 1_000_000),
    "a header that is a list": with_header([]),
    "a header that is not UTF-8": with_header(b'{"\xff": 1}'),
    "overlapping tensors": with_header({"a": entry(0, 8), "b": entry(4, 12)}, bytes(12)),
    "the same bytes for two tensors": with_header({"a": entry(0, 8), "b": entry(0, 8)}, bytes(8)),
    "a gap between tensors": with_header({"a": entry(0, 8), "b": entry(12, 20)}, bytes(20)),
    "a gap before the first tensor": with_header({"a": entry(8, 16)}, bytes(16)),
    "bytes behind the last tensor": with_header(GOOD, bytes(24)),
    "negative offsets": with_header({"a": entry(-8, 0)}, bytes(8)),
    "offsets behind the file": with_header({"a": entry(2**40, 2**40 + 8)}, bytes(8)),
    "an end behind the file": with_header({"a": entry(0, 2**40)}, bytes(8)),
    "an end before the start": with_header({"a": entry(8, 0)}, bytes(8)),
    "offsets that wrap around": with_header({"a": entry(2**64 - 8, 0)}, bytes(8)),
    "offsets that are fractions": with_header({"a": entry(0.5, 8.5)}, bytes(9)),
    "offsets that are text": with_header({"a": entry("0", "8")}, bytes(8)),
    "three offsets": with_header({"a": {**entry(0, 8), "data_offsets": [0, 8, 8]}}, bytes(8)),
    "a key twice": with_header(TWICE, bytes(8)),
    "another dtype than its bytes": with_header({"a": entry(0, 8, dtype="F64")}, bytes(8)),
    "an unknown dtype": with_header({"a": entry(0, 8, dtype="F33")}, bytes(8)),
    "a dtype that is a list": with_header({"a": entry(0, 8, dtype=["F32"])}, bytes(8)),
    "no dtype": with_header({"a": {"shape": [2], "data_offsets": [0, 8]}}, bytes(8)),
    "a shape that overflows to nothing": with_header({"a": entry(0, 0, shape=[2**32, 2**32])}),
    "a shape that overflows by its dtype": with_header({"a": entry(0, 0, shape=[2**62, 4])}),
    "a huge shape of nothing": with_header({"a": entry(0, 0, shape=[2**60, 2**60, 0])}),
    "a shape of endless digits": with_header(b'{"a":{"dtype":"F32","shape":[' + b"9" * 99_999 + b"]}}"),
    "a negative shape": with_header({"a": entry(0, 8, shape=[-2])}, bytes(8)),
    "two negative sizes": with_header({"a": entry(0, 8, shape=[-2, -1])}, bytes(8)),
    "a shape that is true": with_header({"a": entry(0, 4, shape=[True])}, bytes(4)),
    "an index to the parent": an_index_to_elsewhere("../elsewhere.safetensors"),
    "an index to an absolute path": an_index_to_elsewhere("{parent}/elsewhere.safetensors"),
    "an index with a zero byte": an_index_to_elsewhere("shard\0.safetensors"),
    "an index to a folder": with_index({"model.norm.weight": "."}),
    "an index to nothing": with_index({"model.norm.weight": ""}),
    "an index of lists": with_index({"model.norm.weight": ["shard.safetensors"]}),
    "an index with a tensor in no file": with_index({"not.there": "shard.safetensors"}),
    "an index without a tensor of its file": with_index({"model.norm.weight": "shard.safetensors"}),
    "a deep index": a_raw_index(b'{"weight_map":' + b"[" * 1_000_000),
    "a tensor in two files": the_same_tensor_twice,
    "weights outside the directory": a_link(WEIGHTS),
    "weights that link to themselves": a_link_to_itself,
    "a pipe": a_pipe,
    "a folder": a_folder,
}


@pytest.fixture
def hostile(
    request: pytest.FixtureRequest, teacher_directory: Path, supernet_directory: Path, tmp_path: Path
) -> tuple[Path, Path]:
    """A teacher and a supernet spoilt in the same way."""
    spoilt = []
    for good in (teacher_directory, supernet_directory):
        folder = tmp_path / good.name
        folder.mkdir()
        spoilt.append(shutil.copytree(good, folder / "model"))
        HOSTILE[request.param](spoilt[-1])
    return spoilt[0], spoilt[1]


@pytest.mark.parametrize("hostile", HOSTILE, indirect=True)
def test_it_is_refused_quickly_by_everything_that_reads_weights(hostile: tuple[Path, Path], tmp_path: Path):
    teacher, supernet = hostile
    out = tmp_path / "out"
    for read in (
        lambda: convert_teacher(teacher, out),
        lambda: load_supernet(supernet),
        lambda: info(teacher),
        lambda: info(supernet),
    ):
        started = time.process_time()
        with pytest.raises(GearshiftError) as error:
            read()
        assert time.process_time() - started < SECONDS
        assert len(str(error.value)) < 2000
    assert not out.exists()
    assert not list(tmp_path.rglob("ran"))


READ_ALL = """
import resource, sys
from pathlib import Path
from gearshift.errors import GearshiftError
from gearshift.tensor_headers import read_directory

for path in sorted(Path(sys.argv[1]).iterdir()):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    try:
        read_directory(path / "model")
        print(path.name, "was read")
    except GearshiftError:
        grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024
        print(path.name, grown)
"""


def test_it_takes_little_memory(supernet_directory: Path, tmp_path: Path):
    """The reader alone, in a process of its own, which torch and other tests have not made large."""
    for name, spoil in HOSTILE.items():
        shutil.copytree(supernet_directory, tmp_path / name.replace("/", " ") / "model")
        spoil(tmp_path / name / "model")
    environment = {**os.environ, "PYTHONPATH": str(Path(gearshift.__file__).parents[1])}
    command = [sys.executable, "-c", READ_ALL, str(tmp_path)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    grown = {line.rpartition(" ")[0]: line.rpartition(" ")[2] for line in done.stdout.splitlines()}
    assert grown.keys() == HOSTILE.keys()
    assert all(int(megabytes) < MEGABYTES for megabytes in grown.values()), grown


def test_the_hostile_files_spoil_what_is_otherwise_read(
    teacher_directory: Path, supernet_directory: Path, tmp_path: Path
):
    convert_teacher(teacher_directory, tmp_path / "out")
    load_supernet(supernet_directory)
    info(teacher_directory)
    info(supernet_directory)

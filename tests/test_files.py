"""Atomic writes, and files that are not what they should be."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

import gearshift.files as files
from gearshift.errors import FileFormatError, OutputExistsError
from gearshift.files import (
    append_json_line,
    atomic_directory,
    atomic_file,
    check_appendable,
    read_json,
    read_json_lines,
    refuse_existing,
    write_json,
)


def names(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


def test_a_file_appears_when_it_is_complete(tmp_path: Path):
    path = tmp_path / "new" / "file"
    with atomic_file(path) as partial:
        partial.write_text("whole")
        assert not path.exists()
    assert path.read_text() == "whole"
    assert names(path.parent) == ["file"]


@pytest.mark.parametrize("error", [OSError, KeyboardInterrupt])
def test_an_interrupted_file_leaves_the_old_one(error: type[BaseException], tmp_path: Path):
    (tmp_path / "file").write_text("old")
    with pytest.raises(error), atomic_file(tmp_path / "file") as partial:
        partial.write_text("ha")
        raise error
    assert (tmp_path / "file").read_text() == "old"
    assert names(tmp_path) == ["file"]


def test_a_directory_appears_when_it_is_complete(tmp_path: Path):
    with atomic_directory(tmp_path / "out") as partial:
        (partial / "a").touch()
        assert not (tmp_path / "out").exists()
    assert names(tmp_path) == ["out"]
    assert names(tmp_path / "out") == ["a"]


@pytest.mark.parametrize("error", [OSError, KeyboardInterrupt])
def test_an_interrupted_directory_leaves_nothing(error: type[BaseException], tmp_path: Path):
    with pytest.raises(error), atomic_directory(tmp_path / "out") as partial:
        (partial / "a").touch()
        raise error
    assert names(tmp_path) == []


def a_folder(path: Path) -> None:
    path.mkdir()
    (path / "old").write_text("old")


def a_file(path: Path) -> None:
    path.write_text("old")


def a_dangling_link(path: Path) -> None:
    path.symlink_to(path.with_name("nowhere"))


@pytest.mark.parametrize("make", [a_folder, a_file, a_dangling_link])
def test_what_exists_is_replaced_only_when_asked(make: Callable[[Path], None], tmp_path: Path):
    out = tmp_path / "out"
    make(out)
    with pytest.raises(OutputExistsError, match="out already exists; give a new path"), atomic_directory(out):
        pytest.fail("must not be entered")
    with atomic_directory(out, overwrite=True) as partial:
        (partial / "new").touch()
    assert names(out) == ["new"]
    assert names(tmp_path) == ["out"]


def test_a_link_to_a_folder_is_replaced_and_the_folder_kept(tmp_path: Path):
    a_folder(tmp_path / "elsewhere")
    (tmp_path / "out").symlink_to(tmp_path / "elsewhere")
    with atomic_directory(tmp_path / "out", overwrite=True) as partial:
        (partial / "new").touch()
    assert names(tmp_path / "out") == ["new"]
    assert names(tmp_path / "elsewhere") == ["old"]


@pytest.mark.parametrize("error", [OSError, KeyboardInterrupt])
@pytest.mark.parametrize("failing", [1, 2])
def test_an_overwrite_that_fails_at_the_renames_puts_the_old_back(
    failing: int, error: type[BaseException], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    a_folder(tmp_path / "out")
    calls, replace = [], os.replace

    def replace_or_fail(*arguments: Any) -> None:
        calls.append(arguments)
        if len(calls) == failing:
            raise error
        replace(*arguments)

    monkeypatch.setattr(files.os, "replace", replace_or_fail)
    with pytest.raises(error), atomic_directory(tmp_path / "out", overwrite=True) as partial:
        (partial / "new").touch()
    assert names(tmp_path) == ["out"]
    assert names(tmp_path / "out") == ["old"]


# Makes a folder next to its final place, says so, and waits to be killed.
WRITER = """
import sys, time; from pathlib import Path; from gearshift.files import *
with atomic_directory(Path(sys.argv[1]), overwrite=True) as partial:
    write_json(partial / 'config.json', {})
    print('writing', flush=True)
    time.sleep(100)
"""


@contextmanager
def a_writer(out: Path) -> Iterator[subprocess.Popen[str]]:
    """A process in the middle of writing ``out``."""
    command = [sys.executable, "-c", WRITER, str(out)]
    with subprocess.Popen(command, env=_environment(), stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "writing\n"
        try:
            yield process
        finally:
            process.kill()


def test_what_a_killed_process_leaves_is_cleared_by_the_next_of_the_same_name(tmp_path: Path):
    with a_writer(tmp_path / "out") as process:
        process.kill()
        process.wait()
    (left,) = names(tmp_path)
    assert left.endswith(".partial")
    with atomic_directory(tmp_path / "other"):
        pass
    assert names(tmp_path) == sorted([left, "other"])
    with atomic_directory(tmp_path / "out") as partial:
        assert names(tmp_path) == sorted([partial.name, "other"])
    assert names(tmp_path) == ["other", "out"]


def test_what_a_living_process_writes_is_left_alone(tmp_path: Path):
    with a_writer(tmp_path / "out"):
        (theirs,) = names(tmp_path)
        with atomic_directory(tmp_path / "out"):
            assert names(tmp_path / theirs) == ["config.json"]
        assert names(tmp_path) == sorted([theirs, "out"])


@pytest.mark.parametrize("new_is_there", [False, True])
def test_what_an_overwrite_had_moved_away_is_not_lost(
    new_is_there: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """A process killed between the renames, or after them."""
    out, moved = tmp_path / "out", tmp_path / ".out.01234567.old"
    a_folder(moved)
    (tmp_path / ".out.89abcdef.partial").mkdir()
    if new_is_there:
        a_folder(out)
        (out / "new").touch()
    with pytest.raises(OutputExistsError), atomic_directory(out):
        pytest.fail("must not be entered")
    assert names(tmp_path) == ["out"]
    assert names(out) == (["new", "old"] if new_is_there else ["old"])


@pytest.mark.parametrize("name", [".out.0123456.partial", ".outs.01234567.partial", ".out.01234567.keep"])
def test_folders_of_other_names_are_nobodys_leavings(name: str, tmp_path: Path):
    (tmp_path / name).mkdir()
    (tmp_path / ".out.01234567.partial").touch()  # a file may be being written by a living process
    with atomic_directory(tmp_path / "out"):
        pass
    assert names(tmp_path) == sorted([name, ".out.01234567.partial", "out"])


def test_without_locks_nothing_is_cleared_and_all_else_works(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def refuse(*arguments: object) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(files.fcntl, "flock", refuse)
    (tmp_path / ".out.01234567.partial").mkdir()
    with atomic_directory(tmp_path / "out") as partial:
        (partial / "new").touch()
    assert names(tmp_path) == [".out.01234567.partial", "out"]


def _environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(Path(files.__file__).parents[1])}


def test_an_empty_folder_is_free(tmp_path: Path):
    refuse_existing(tmp_path)
    refuse_existing(tmp_path / "nothing")


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)


@given(value=json_values)
def test_json_survives(value: Any, tmp_path_factory: pytest.TempPathFactory):
    path = tmp_path_factory.getbasetemp() / "value.json"
    write_json(path, value)
    assert read_json(path) == value


def test_not_a_number_is_never_written(tmp_path: Path):
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_json(tmp_path / "value.json", {"loss": float("nan")})
    assert names(tmp_path) == []


HOSTILE_JSON = [b"[" * 1_000_000, b'{"a":' * 1_000_000, b"1" * 1_000_000]


@pytest.mark.parametrize("content", [b"", b"{", b"\xff\xfe\x00", b'{"a": 1} x', *HOSTILE_JSON])
def test_what_is_not_json_is_named(content: bytes, tmp_path: Path):
    path = tmp_path / "value.json"
    with pytest.raises(FileFormatError, match=r"value\.json is missing"):
        read_json(path)
    path.write_bytes(content)
    with pytest.raises(FileFormatError, match=r"value\.json is not valid JSON"):
        read_json(path)


def test_json_of_absurd_size_is_not_read(tmp_path: Path):
    path = tmp_path / "value.json"
    path.touch()
    os.truncate(path, 1 << 40)  # takes no room on the disk
    with pytest.raises(FileFormatError, match=r"value\.json has 1099511627776 bytes; expected"):
        read_json(path)


@given(rows=st.lists(st.dictionaries(st.text(), json_values, max_size=3), max_size=4), torn=st.binary())
def test_rows_survive_and_a_torn_line_does_not(
    rows: list[dict[str, Any]], torn: bytes, tmp_path_factory: pytest.TempPathFactory
):
    path = tmp_path_factory.getbasetemp() / "rows.jsonl"
    path.write_bytes(b"")
    for row in rows:
        append_json_line(path, row)
    with path.open("ab") as file:
        file.write(torn.replace(b"\n", b"?"))
    assert read_json_lines(path) == rows
    append_json_line(path, {"after": 1})
    assert read_json_lines(path) == [*rows, {"after": 1}]


def test_a_first_line_that_is_torn_is_dropped(tmp_path: Path):
    path = tmp_path / "new" / "rows.jsonl"
    append_json_line(path, {"a": 1})
    path.write_bytes(b'{"a"')
    append_json_line(path, {"b": 2})
    assert path.read_text() == '{"b": 2}\n'


def test_what_cannot_be_appended_to_is_refused_beforehand(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    check_appendable(tmp_path / "new" / "deeper" / "rows.jsonl")
    (tmp_path / "rows.jsonl").touch()
    check_appendable(tmp_path / "rows.jsonl")
    with pytest.raises(FileFormatError, match="is a folder; expected a file to append rows to"):
        check_appendable(tmp_path)
    with pytest.raises(FileFormatError, match="rows.jsonl is no folder; give another path"):
        check_appendable(tmp_path / "rows.jsonl" / "rows.jsonl")
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    for path in (tmp_path / "rows.jsonl", tmp_path / "new" / "rows.jsonl"):
        with pytest.raises(FileFormatError, match="cannot be written: .* is read-only; give another path"):
            check_appendable(path)
    assert [path.name for path in tmp_path.iterdir()] == ["rows.jsonl"]


def test_appending_reads_one_byte_of_a_whole_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    path = tmp_path / "rows.jsonl"
    append_json_line(path, {"a": 1})
    taken: list[int] = []
    opened = Path.open

    def watched(self: Path, mode: str = "r") -> Any:
        file = opened(self, mode)
        if mode == "rb+":
            file = _Watched(file, taken)
        return file

    monkeypatch.setattr(Path, "open", watched)
    append_json_line(path, {"b": 2})
    assert taken == [1]


class _Watched:
    """A file that notes how much is read of it."""

    def __init__(self, file: Any, taken: list[int]) -> None:
        self.file, self.taken, self.seek, self.truncate = file, taken, file.seek, file.truncate

    def __enter__(self) -> _Watched:
        return self

    def __exit__(self, *error: object) -> None:
        self.file.close()

    def read(self, size: int = -1) -> bytes:
        self.taken.append(size)
        return self.file.read(size)


@pytest.mark.parametrize(
    ("line", "said"),
    [
        (b"{", "line 2: not valid JSON"),
        (b"[" * 99_999, "line 2: not valid JSON"),
        (b"\xff", "line 2: not valid JSON"),
        (b"[1]", "found list"),
    ],
)
def test_a_wrong_row_is_named(line: bytes, said: str, tmp_path: Path):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'{"a": 1}\n' + line + b'\n{"b": 2}\n')
    with pytest.raises(FileFormatError, match=said):
        read_json_lines(path)


def test_rows_of_other_programs_are_read(tmp_path: Path):
    """Blank lines, Windows line ends, and line separators that JSON allows inside a string."""
    path = tmp_path / "rows.jsonl"
    text = "a\u2028b\u0085c"
    path.write_bytes(json.dumps({"text": text}, ensure_ascii=False).encode() + b'\r\n\n{"b": 2}\n')
    assert read_json_lines(path) == [{"text": text}, {"b": 2}]

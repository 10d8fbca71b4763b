"""Reading and writing files so that an interruption never leaves something half-written that loads.

Everything is written under a temporary name beside its destination and renamed when it is complete.
"""

from __future__ import annotations

import fcntl
import json
import os
import re
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from gearshift.errors import FileFormatError, OutputExistsError

# The index of a model with some 100,000 tensors. A hostile file of this size takes some 400 MB of memory.
MAX_JSON_BYTES = 1 << 24
# How the names of temporary files and folders end: unfinished ones, and one that is about to be replaced.
PARTIAL, OLD = ".partial", ".old"


def refuse_existing(path: Path) -> None:
    """Raise if there is something at ``path``.

    Raises:
        OutputExistsError: a file, or a folder that is not empty, is in the way.
    """
    if path.is_dir() and not any(path.iterdir()):
        return
    if os.path.lexists(path):
        raise OutputExistsError(
            f"the output {path} already exists; give a new path, remove it, or ask to overwrite it"
        )


def _temporary_sibling(path: Path, kind: str = PARTIAL) -> Path:
    return path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}{kind}")


@contextmanager
def atomic_file(path: Path) -> Iterator[Path]:
    """Yield a temporary path; what is written there replaces ``path`` when the block ends well."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = _temporary_sibling(path)
    try:
        yield partial
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


@contextmanager
def atomic_directory(path: Path, overwrite: bool = False) -> Iterator[Path]:
    """Yield a temporary folder that becomes ``path`` when the block ends well, and is removed otherwise.

    What a killed process left of the same folder is cleared away first.

    Raises:
        OutputExistsError: ``path`` holds something and ``overwrite`` is false.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    _clear_after_killed(path)
    if not overwrite:
        refuse_existing(path)
    old = _temporary_sibling(path, OLD)
    with _locked_sibling(path) as partial:
        try:
            yield partial
            _replace_directory(partial, path, old)
        finally:
            if os.path.lexists(path):
                _remove(old)


@contextmanager
def _locked_sibling(path: Path) -> Iterator[Path]:
    """Make a temporary folder and hold a lock on it, which ends with this process however that ends."""
    while True:
        partial = _temporary_sibling(path)
        try:
            partial.mkdir()
            with _lock(partial):
                # Another process may have taken it for a killed one's before the lock was there.
                if partial.exists():
                    yield partial
                    return
        finally:
            _remove(partial)


@contextmanager
def _lock(folder: Path, wait: bool = True) -> Iterator[bool]:
    """Hold a lock on a folder; yields whether it was free."""
    try:
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    except OSError:
        yield False
        return
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        free = True
    except OSError:  # held by another, or a file system without locks
        free = False
    try:
        yield free
    finally:
        os.close(descriptor)


def _clear_after_killed(path: Path) -> None:
    """Remove temporary folders that no process holds; put back what an overwrite had moved away."""
    temporary = re.compile(re.escape(f".{path.name}.") + "[0-9a-f]{8}" + f"({PARTIAL}|{OLD})")
    found = sorted(f for f in path.parent.iterdir() if temporary.fullmatch(f.name) and f.is_dir())
    for folder in found:
        with _lock(folder, wait=False) as abandoned:
            if not abandoned:
                return
            if folder.name.endswith(PARTIAL):
                _remove(folder)
    for folder in found:
        if folder.name.endswith(OLD):
            if os.path.lexists(path):
                _remove(folder)
            else:
                os.replace(folder, path)


def _replace_directory(new: Path, path: Path, old: Path) -> None:
    """Put ``new`` at ``path``; what was there moves to ``old`` first, so no moment shows a mixture."""
    try:
        if os.path.lexists(path):
            os.replace(path, old)
        os.replace(new, path)
    except BaseException:
        if os.path.lexists(old) and not os.path.lexists(path):
            os.replace(old, path)
        raise


def _remove(path: Path) -> None:
    """Remove a folder or, where one was overwritten, a file or a link."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def read_json(path: Path) -> Any:  # noqa: ANN401 - JSON is whatever the file holds
    """Read a JSON file.

    Raises:
        FileFormatError: the file is missing, is not JSON, or is far larger than any that is read here.
    """
    try:
        size = path.stat().st_size
        if size > MAX_JSON_BYTES:
            raise FileFormatError(f"{path} has {size} bytes; expected {MAX_JSON_BYTES} at most: restore it")
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise FileFormatError(f"{path} is missing; expected a JSON file there") from None
    except (
        ValueError,
        RecursionError,
    ) as error:  # also text that is not UTF-8, and numbers of endless digits
        raise FileFormatError(f"{path} is not valid JSON ({error}); restore or remake it") from None


def write_json(path: Path, value: Any) -> None:  # noqa: ANN401 - any JSON value
    """Write ``value`` as indented JSON, atomically."""
    with atomic_file(path) as partial:
        partial.write_text(json.dumps(value, indent=2, allow_nan=False) + "\n", encoding="utf-8")


def check_appendable(path: Path) -> None:
    """Refuse a file to which no line can be added, before what takes long is done for it.

    Raises:
        FileFormatError: it is a folder, or it or the folder in which it would be is read-only.
    """
    there = next(place for place in (path.absolute(), *path.absolute().parents) if os.path.lexists(place))
    if path.is_dir():
        raise FileFormatError(f"{path} is a folder; expected a file to append rows to: give another path")
    if not os.access(there, os.W_OK):
        raise FileFormatError(f"{path} cannot be written: {there} is read-only; give another path")
    if there != path.absolute() and not there.is_dir():
        raise FileFormatError(f"{path} cannot be written: {there} is no folder; give another path")


def append_json_line(path: Path, row: dict[str, Any]) -> None:
    """Append one row to a JSON-lines file and force it to the disk.

    A last line torn by a crash is removed first, so that the new row starts on a line of its own.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    _drop_torn_line(path)
    with path.open("ab") as file:
        file.write((json.dumps(row, allow_nan=False) + "\n").encode())
        file.flush()
        os.fsync(file.fileno())


def _drop_torn_line(path: Path) -> None:
    if not path.exists():
        return
    with path.open("rb+") as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(max(size - 1, 0))
        if file.read(1) in (b"", b"\n"):
            return
        file.seek(0)
        file.truncate(file.read().rfind(b"\n") + 1)


def read_json_lines(path: Path) -> list[dict[str, Any]]:
    """Read the rows of a JSON-lines file; a torn last line (no line end) is left out.

    Raises:
        FileFormatError: a complete line is not a JSON object; the message names the line.
    """
    rows: list[dict[str, Any]] = []
    complete, _, _ = path.read_bytes().rpartition(b"\n")
    for number, line in enumerate(complete.split(b"\n"), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise FileFormatError(f"{path}, line {number}: not valid JSON ({error})") from None
        if not isinstance(row, dict):
            raise FileFormatError(
                f"{path}, line {number}: expected a JSON object, found {type(row).__name__}"
            )
        rows.append(row)
    return rows

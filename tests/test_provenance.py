"""What every result row says about where it came from."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path

import pytest

import gearshift.provenance as provenance_module
from gearshift.provenance import hardware, provenance


@pytest.fixture(autouse=True)
def fresh() -> None:
    for cached in (provenance_module._fixed_part, hardware):
        cached.cache_clear()


def test_every_field_is_there():
    given = provenance()
    assert set(given) == {"commit", "command", "python", "torch", "transformers", "hardware", "date"}
    assert all(isinstance(value, str) and value for value in given.values())
    assert given["python"] == ".".join(map(str, sys.version_info[:3]))
    assert re.fullmatch(r"[0-9a-f]{12}(\+changes)?|unknown", given["commit"])
    age = datetime.now(UTC) - datetime.strptime(given["date"], "%Y-%m-%dT%H:%M:%SZ").replace(tzinfo=UTC)
    assert -1 <= age.total_seconds() < 60
    json.dumps(given)


def test_the_command_names_no_folder_of_the_program(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(sys, "argv", ["/somewhere/bin/gearshift", "convert", "teacher", "out"])
    assert provenance()["command"] == "gearshift convert teacher out"


def repository(path: Path) -> Path:
    package = path / "package"
    package.mkdir()
    (package / "file.py").write_text("a = 1\n")
    author = ["-c", "user.name=a", "-c", "user.email=a@example.org"]
    for command in (["init", "-q"], ["add", "."], [*author, "commit", "-q", "-m", "first"]):
        subprocess.run(["git", "-C", str(path), *command], check=True)
    return package / "file.py"


def test_the_commit_tells_edited_from_clean(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    file = repository(tmp_path)
    monkeypatch.setattr(provenance_module, "__file__", str(file))
    clean = provenance()["commit"]
    assert re.fullmatch(r"[0-9a-f]{12}", clean)
    file.write_text("a = 2\n")
    provenance_module._fixed_part.cache_clear()
    assert provenance()["commit"] == clean + "+changes"


def test_outside_a_checkout_or_without_git_the_commit_is_unknown(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    monkeypatch.setattr(provenance_module, "__file__", str(tmp_path / "file.py"))
    assert provenance()["commit"] == "unknown"
    provenance_module._fixed_part.cache_clear()
    monkeypatch.setenv("PATH", str(tmp_path))
    assert provenance()["commit"] == "unknown"


def test_a_package_that_is_not_there():
    assert provenance_module._version("no-such-package-as-this") == "not installed"


def test_the_processor_and_its_cores_are_named(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delitem(sys.modules, "torch", raising=False)
    assert re.fullmatch(r".+, \d+ cores", hardware())


def test_it_imports_no_torch():
    program = (
        "import sys; from gearshift.provenance import provenance; provenance(); print('torch' in sys.modules)"
    )
    environment = {**os.environ, "PYTHONPATH": str(Path(provenance_module.__file__).parents[1])}
    ended = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, check=True)
    assert ended.stdout == b"False\n"

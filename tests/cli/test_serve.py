"""``gearshift serve``: what it says at its start, that it serves, and how it ends."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from typer.testing import Result

from gearshift.placement import Placement
from gearshift.presets import Preset, write_presets

Gearshift = Callable[..., Result]


@pytest.fixture
def supernet(supernet_directory: Path, tmp_path: Path) -> Path:
    directory = shutil.copytree(supernet_directory, tmp_path / "supernet")
    presets = [
        Preset("teacher", Placement.parse("fa*3"), retention=1.0),
        Preset("fast", Placement.parse("gdn*2 swa"), retention=0.925),
    ]
    write_presets(directory, presets)
    return directory


class Served:
    """The command in a process of its own."""

    def __init__(self, *arguments: object) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-m", "gearshift", "serve", *map(str, arguments), "--port", "0"],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, "COLUMNS": "120", "ADMIN": "secret"},
        )
        assert self.process.stdout is not None
        self.said = ""
        for line in self.process.stdout:
            self.said += line
            if line.startswith("try:"):
                break
        address = re.search(r"listening at (http://127.0.0.1:\d+)/v1", self.said)
        assert address is not None, self.said
        self.address = address[1]

    def ask(self, path: str, body: dict[str, Any] | None = None, **headers: str) -> Any:
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self.address + path, data, headers)
        with urllib.request.urlopen(request, timeout=60) as reply:
            return json.load(reply)

    def stop(self) -> tuple[int, str, str]:
        self.process.send_signal(signal.SIGINT)
        out, err = self.process.communicate(timeout=60)
        return self.process.returncode, out, err


@pytest.fixture
def served(supernet: Path) -> Iterator[Callable[..., Served]]:
    running: list[Served] = []

    def start(*arguments: object) -> Served:
        running.append(Served(supernet, *arguments))
        return running[-1]

    yield start
    for one in running:
        one.process.kill()
        one.process.communicate()


def test_it_says_what_it_serves_serves_it_and_ends(served: Callable[..., Served]):
    server = served("--name", "net", "--default-preset", "fast", "--admin-key-env", "ADMIN")
    rows = {row[0]: row[1:] for row in re.findall(r"│ (\S+) +│" + r" +(\S+) │" * 6, server.said)}
    # Keys and values of two heads of 8 channels in float32, for 128 tokens of context in three layers.
    assert rows["net:teacher"] == ("3", "0", "0", "0", "100.0%", f"{3 * 2 * 2 * 8 * 4 * 128:,}")
    assert rows["net:fast"][:5] == ("0", "1", "2", "0", "92.5%")
    assert rows["net"] == rows["net:fast"]
    assert "engine: embedded. Without vLLM on a GPU" in server.said
    assert "secret" not in server.said
    models = server.ask("/v1/models")["data"]
    assert [model["id"] for model in models] == ["net", "net:teacher", "net:fast"]
    assert models[0]["placement"] == "gdn*2 swa"
    body = {"model": "net:fast", "prompt": "x = 1", "max_tokens": 3, "ignore_eos": True}
    assert server.ask("/v1/completions", body)["usage"]["completion_tokens"] == 3
    preset = {"name": "new", "placement": "kda*3"}
    assert server.ask("/v1/presets", preset, Authorization="Bearer secret")["name"] == "new"
    assert server.stop() == (0, "stopped\n", "")


def test_the_name_is_the_directorys(served: Callable[..., Served]):
    server = served()
    assert "│ supernet:fast" in server.said
    assert "/v1/presets" not in server.said
    assert server.stop()[0] == 0


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--default-preset", "quick"], "no preset 'quick'; this supernet's presets: teacher, fast"),
        (["--admin-key-env", "NO_SUCH_VARIABLE"], "the environment variable NO_SUCH_VARIABLE is empty"),
        (["--host", "256.1.1.1"], ""),
    ],
)
def test_what_is_refused(options: list[str], said: str, gearshift: Gearshift, supernet: Path):
    result = gearshift("serve", supernet, "--port", 0, *options)
    assert result.exit_code == 1
    assert result.stderr.startswith("error: ")
    assert said in result.stderr


def test_a_port_that_is_taken_is_refused_before_the_model_is_loaded(
    gearshift: Gearshift, supernet: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("gearshift.supernet.load_supernet", lambda *_, **__: pytest.fail("it was loaded"))
    with socket.create_server(("127.0.0.1", 0)) as taken:
        result = gearshift("serve", supernet, "--port", taken.getsockname()[1])
    assert result.exit_code == 1
    assert "in use" in result.stderr


def test_a_teacher_is_refused(gearshift: Gearshift, teacher_directory: Path):
    result = gearshift("serve", teacher_directory)
    assert result.exit_code == 1
    assert "make a supernet of it with gearshift convert" in result.stderr

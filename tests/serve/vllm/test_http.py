"""vLLM's own OpenAI server, started as anybody starts it, over real HTTP."""

from __future__ import annotations

import http.client
import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("vllm", reason="vllm is not installed; tests/serve/vllm/rig says how")

import torch

from gearshift.supernet import SupernetForCausalLM, load_supernet
from tests.serve.vllm.tiny import PRESETS

START_SECONDS = 240
OPTIONS = ["--dtype", "float32", "--max-model-len", "256", "--max-num-seqs", "8", "--block-size", "16"]


class Server:
    def __init__(self, directory: Path, log: Path) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        command = [sys.executable, "-m", "vllm.entrypoints.cli.main", "serve", str(directory)]
        command += ["--served-model-name", "tiny", "--host", "127.0.0.1", "--port", str(self.port)]
        source = str(Path(__file__).parents[3] / "src")
        paths = os.pathsep.join([source, os.environ["PYTHONPATH"]])
        self._log = log.open("wb")
        self.process = subprocess.Popen(
            [*command, "--enforce-eager", *OPTIONS],
            env={**os.environ, "PYTHONPATH": paths},
            stdout=self._log,
            stderr=subprocess.STDOUT,
        )
        self.log = log

    def wait(self) -> None:
        deadline = time.monotonic() + START_SECONDS
        while time.monotonic() < deadline and self.process.poll() is None:
            try:
                if self.call("GET", "/health")[0] == 200:
                    return
            except OSError:
                time.sleep(0.5)
        raise AssertionError(f"the server did not start:\n{self.log.read_text()[-5000:]}")

    def call(self, method: str, path: str, body: Any = None) -> tuple[int, Any]:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=120)
        content = None if body is None else json.dumps(body)
        connection.request(method, path, content, {"Content-Type": "application/json"})
        response = connection.getresponse()
        text = response.read()
        connection.close()
        return response.status, json.loads(text) if text[:1] == b"{" else text

    def complete(self, **fields: Any) -> tuple[int, Any]:
        body = {"temperature": 0, "max_tokens": 5, "return_token_ids": True, "ignore_eos": True, **fields}
        return self.call("POST", "/v1/completions", body)

    def stop(self) -> None:
        self.process.terminate()
        self.process.wait(30)
        self._log.close()


@pytest.fixture(scope="module")
def server(served_directory: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    server = Server(served_directory, tmp_path_factory.mktemp("server") / "log")
    try:
        server.wait()
        yield server
    finally:
        server.stop()


@pytest.fixture(scope="module")
def reference(served_directory: Path) -> SupernetForCausalLM:
    return load_supernet(served_directory)


@torch.no_grad()
def greedy(reference: SupernetForCausalLM, placement: str, prompt: list[int], tokens: int) -> list[int]:
    text = list(prompt)
    for _ in range(tokens):
        text.append(int(reference(torch.tensor([text]), placement=placement).logits[0, -1].argmax()))
    return text[len(prompt) :]


def test_models_and_presets_are_listed(server):
    status, answer = server.call("GET", "/v1/models")
    assert status == 200
    assert [card["id"] for card in answer["data"]] == ["tiny", *(f"tiny:{name}" for name in PRESETS)]


def test_every_preset_and_placement_answers_for_itself_at_the_same_time(server, reference):
    prompt = list(range(3, 60))
    asked = [({"model": "tiny"}, "fa*6")]
    asked += [({"model": f"tiny:{name}"}, placement) for name, placement in PRESETS.items()]
    asked += [({"model": "tiny", "vllm_xargs": {"placement": "kda*2 fa swa*3"}}, "kda*2 fa swa*3")]
    with ThreadPoolExecutor(len(asked)) as pool:
        answers = list(pool.map(lambda row: server.complete(prompt=prompt, **row[0]), asked))
    for (fields, placement), (status, answer) in zip(asked, answers, strict=True):
        assert status == 200, (fields, answer)
        assert answer["choices"][0]["token_ids"] == greedy(reference, placement, prompt, 5), fields


@pytest.mark.parametrize(
    ("fields", "status"),
    [
        ({"model": "tiny:what"}, 404),
        ({"model": "tiny", "vllm_xargs": {"placement": "fa*7"}}, 400),
        ({"model": "tiny", "placement": "x" * 1_000_000}, 400),
        ({"model": "tiny:fast", "prompt": [5] * 300}, 400),
        ({"model": "tiny:fast", "prompt": [5], "max_tokens": -1}, 400),
    ],
)
def test_what_does_not_fit_is_an_error_of_openais_form_and_the_server_goes_on(server, fields, status):
    answered, answer = server.complete(**{"prompt": [1, 2, 3], **fields})
    assert answered == status
    assert {"message", "type", "param", "code"} <= set(answer["error"])
    assert server.complete(model="tiny:fast", prompt=[1, 2, 3])[0] == 200

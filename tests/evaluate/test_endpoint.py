"""A served supernet, evaluated over HTTP, against what an evaluation of its directory says."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest

from gearshift.evaluate.endpoint import Endpoint, EndpointError, _recalls, evaluate_endpoint
from gearshift.evaluate.held_out import EncodedExample
from gearshift.evaluate.quality import evaluate_placements
from gearshift.evaluate.table import read_table
from gearshift.placement import Placement
from gearshift.presets import Preset
from gearshift.serve.catalog import Catalog
from gearshift.supernet import load_supernet
from gearshift.train.tokens import load_tokenizer
from tests.serve.embedded.tools import Serving

PRESETS = {"teacher": "fa*3", "fast": "gdn*3"}
SIZES = {"tokens": 96, "sequence_length": 32, "progress": False}


@pytest.fixture(scope="module")
def serving(supernet_directory: Path) -> Iterator[Serving]:
    model, tokenizer = load_supernet(supernet_directory), load_tokenizer(supernet_directory)
    presets = [Preset(name, Placement.parse(text)) for name, text in PRESETS.items()]
    serving = Serving(model, tokenizer, Catalog("tiny", model.placement_space, presets))
    yield serving
    serving.close()


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.py"
    path.write_text("".join(f"value_{n} = {n * 37}\n" for n in range(40)))
    return path


def url_of(port: int) -> str:
    return f"http://127.0.0.1:{port}/v1"


def test_served_presets_have_the_loss_of_their_placements(serving, supernet_directory, text, tmp_path):
    out = tmp_path / "served.jsonl"
    endpoint = Endpoint(url_of(serving.client.port))
    assert endpoint.models()["tiny:fast"] == Placement.parse("gdn*3")
    rows = evaluate_endpoint(endpoint, ["tiny:fast"], supernet_directory, text, None, out, **SIZES)
    wanted = [Placement.parse("gdn*3")]
    direct = evaluate_placements(supernet_directory, wanted, text, None, tmp_path / "own.jsonl", **SIZES)
    for column in ("loss", "quality", "retention"):
        assert rows[0][column] == pytest.approx(direct[0][column], rel=1e-4)
    for column in ("placement", "data", "tokens"):
        assert rows[0][column] == direct[0][column]
    assert rows[0]["kl"] is None
    assert rows[0]["checkpoint"] == f"{direct[0]['checkpoint']} served"
    assert [row["placement"] for row in read_table(out)] == ["fa*3", "gdn*3"]
    again = evaluate_endpoint(endpoint, ["tiny:fast"], supernet_directory, text, None, out, **SIZES)
    assert again == rows and len(read_table(out)) == 2


def test_a_name_that_is_not_served_is_refused(serving, supernet_directory, text, tmp_path):
    endpoint = Endpoint(url_of(serving.client.port))
    with pytest.raises(EndpointError, match=r"serves no model 'tiny:slow' .*it serves tiny"):
        evaluate_endpoint(
            endpoint, ["tiny:slow"], supernet_directory, text, None, tmp_path / "t.jsonl", **SIZES
        )


@contextmanager
def answering(answer: Callable[[dict[str, Any]], tuple[int, Any]]) -> Iterator[Endpoint]:
    """A server of another make, for `Endpoint.log_likelihoods`."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            status, content = answer({**body, "authorization": self.headers["Authorization"]})
            self.send_response(status)
            self.end_headers()
            self.wfile.write(json.dumps(content).encode())

        def log_message(self, format: str, *args: object) -> None:
            pass

    server = HTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield Endpoint(url_of(server.server_address[1]), "secret")
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def test_servers_that_echo_are_understood():
    asked = []

    def answer(body: dict[str, Any]) -> tuple[int, Any]:
        asked.append(body)
        if "prompt_logprobs" in body:
            return 400, {"error": {"message": "unknown field"}}
        return 200, {"choices": [{"logprobs": {"token_logprobs": [None, -1.0, -2.5, -0.25]}}]}

    with answering(answer) as endpoint:
        assert endpoint.log_likelihoods("m", [7, 8, 9]) == [-1.0, -2.5]
        assert endpoint.log_likelihoods("m", [7, 8, 9]) == [-1.0, -2.5]
    assert ["echo" in body for body in asked] == [False, True, True]
    assert asked[0]["authorization"] == "Bearer secret"
    assert asked[0]["prompt"] == [7, 8, 9]


@pytest.mark.parametrize(
    ("status", "content", "says"),
    [
        (
            200,
            {"choices": [{"text": "x", "logprobs": None}]},
            "prompt_logprobs was ignored; echo, logprobs was",
        ),
        (500, {"error": "broken"}, "answered 500"),
        (200, {"choices": []}, "a form that is not known"),
        (200, {"choices": [{"prompt_logprobs": [None, {"1": {"logprob": -1}}]}]}, "a form that is not known"),
        (200, [], "answered with no JSON object"),
    ],
)
def test_servers_that_tell_nothing_are_named(status: int, content: Any, says: str):
    with answering(lambda body: (status, content)) as endpoint, pytest.raises(EndpointError, match=says):
        endpoint.log_likelihoods("m", [7, 8])


def test_a_server_that_is_not_there_is_named():
    with pytest.raises(EndpointError, match="cannot be read: .*is the server running"):
        Endpoint("http://127.0.0.1:1/v1").models()


@pytest.mark.parametrize(("said", "right"), [("cd", True), ("ce", False), ("c", False)])
def test_an_answer_is_recalled_if_the_server_says_it_next(said: str, right: bool):
    def answer(body: dict[str, Any]) -> tuple[int, Any]:
        assert (body["prompt"], body["max_tokens"], body["temperature"]) == ([97, 98], 2, 0)
        return 200, {"choices": [{"text": said}]}

    example = EncodedExample("copy", (97, 98, 99, 100), 2)
    with answering(answer) as endpoint:
        assert _recalls(endpoint, "m", example, lambda ids: "".join(map(chr, ids))) == right

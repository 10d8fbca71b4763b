"""The middleware in front of a pretended server, which says what it was asked."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest

from gearshift.placement import Placement, PlacementSpace
from gearshift.presets import Preset
from gearshift.serve.catalog import Catalog
from gearshift.serve.vllm.middleware import PresetMiddleware

COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"
PRESETS = {"teacher": "fa*3", "fast": "gdn*3"}
JSON = [(b"content-type", b"application/json")]


class PretendedServer:
    """Answers the list of models, 401 if told to, and otherwise what body it got."""

    def __init__(self, closed: bool = False) -> None:
        self.closed, self.bodies = closed, []

    async def __call__(self, scope, receive, send):
        if self.closed:
            await self._answer(send, 401, {"error": "Unauthorized"})
        elif scope["path"] == "/v1/models":
            await self._answer(send, 200, {"object": "list", "data": [{"id": "tiny", "max_model_len": 9}]})
        else:
            body = (await receive())["body"]
            lengths = [value for name, value in scope["headers"] if name == b"content-length"]
            assert lengths == [str(len(body)).encode()]
            self.bodies.append(json.loads(body) if body[-1:] == b"}" else body)
            assert (await receive())["type"] == "http.disconnect"
            await self._answer(send, 200, {})

    async def _answer(self, send, status, body):
        content = json.dumps(body).encode()
        length = (b"content-length", str(len(content)).encode())
        await send({"type": "http.response.start", "status": status, "headers": [*JSON, length]})
        await send({"type": "http.response.body", "body": content})


class Caller:
    def __init__(self, **options: Any) -> None:
        self.server = PretendedServer(**options)
        presets = [Preset(name, Placement.parse(text)) for name, text in PRESETS.items()]
        self.catalog = Catalog("tiny", PlacementSpace(3), presets)
        self.app = PresetMiddleware(self.server, self.catalog, ("alias",))

    def ask(self, method: str, path: str, content: bytes = b"", headers=JSON) -> tuple[int, Any]:
        # A body may come in pieces.
        parts = [content[:5], content[5:]] if headers is JSON else [content]
        sent: list[Any] = []

        async def receive():
            if parts:
                return {"type": "http.request", "body": parts.pop(0), "more_body": bool(parts)}
            return {"type": "http.disconnect"}

        async def send(message):
            sent.append(message)

        length = [(b"content-length", str(len(content)).encode())]
        scope = {"type": "http", "method": method, "path": path, "headers": [*headers, *length]}
        asyncio.run(self.app(scope, receive, send))
        content = b"".join(message["body"] for message in sent[1:])
        assert (b"content-length", str(len(content)).encode()) in sent[0]["headers"]
        return sent[0]["status"], json.loads(content)

    def post(self, path: str, **body: Any) -> tuple[int, Any]:
        return self.ask("POST", path, json.dumps(body).encode())


@pytest.mark.parametrize(
    ("body", "placement"),
    [
        ({}, "fa*3"),
        ({"model": "tiny"}, "fa*3"),
        ({"model": "tiny:fast"}, "gdn*3"),
        ({"model": "alias:fast"}, "gdn*3"),
        ({"model": "tiny", "placement": "fa kda, swa"}, "fa kda swa"),
        ({"model": "tiny", "vllm_xargs": {"placement": ["full_attention"] * 3}}, "fa*3"),
        ({"model": "tiny:fast", "vllm_xargs": {"placement": "gdn gdn gdn"}}, "gdn*3"),
    ],
)
@pytest.mark.parametrize("path", [COMPLETIONS, CHAT])
def test_requests_reach_vllm_in_its_own_words(path, body, placement):
    caller = Caller()
    assert caller.post(path, prompt="hi", **body)[0] == 200
    named = {"model": "tiny"} if "model" in body else {}
    assert caller.server.bodies == [{"prompt": "hi", **named, "vllm_xargs": {"placement": placement}}]


def test_other_arguments_of_vllm_are_kept():
    caller = Caller()
    caller.post(COMPLETIONS, model="tiny:fast", vllm_xargs={"other": 1})
    assert caller.server.bodies[0]["vllm_xargs"] == {"other": 1, "placement": "gdn*3"}


@pytest.mark.parametrize(
    ("body", "status", "said"),
    [
        ({"model": "tiny:fats"}, 404, "teacher, fast"),
        ({"model": "llama"}, 404, "'tiny'"),
        ({"model": "tiny", "placement": "fa*2"}, 400, "expected 3"),
        ({"model": "tiny", "placement": "fa*2 what"}, 400, "what"),
        ({"model": "tiny", "placement": "fa " * 400_000}, 400, "1,200,000 characters"),
        ({"model": "tiny", "placement": 7}, 400, "int"),
        ({"model": "tiny", "vllm_xargs": [1]}, 400, "vllm_xargs"),
        ({"model": "tiny:fast", "placement": "fa*3"}, 400, "spells out"),
    ],
)
def test_what_does_not_fit_never_reaches_vllm(body, status, said):
    caller = Caller()
    answered, answer = caller.post(CHAT, messages=[], **body)
    assert (answered, caller.server.bodies) == (status, [])
    assert answer["error"].keys() == {"message", "type", "param", "code"}
    assert said in answer["error"]["message"] and len(answer["error"]["message"]) < 500


def test_without_the_servers_key_nobody_learns_the_presets():
    status, answer = Caller(closed=True).post(CHAT, model="tiny:what")
    assert (status, answer) == (401, {"error": "Unauthorized"})


def test_presets_are_listed_behind_the_model():
    status, answer = Caller().ask("GET", "/v1/models")
    assert status == 200
    assert [(card["id"], card["placement"]) for card in answer["data"]] == [
        ("tiny", "fa*3"),
        ("tiny:teacher", "fa*3"),
        ("tiny:fast", "gdn*3"),
    ]
    assert all(card["max_model_len"] == 9 for card in answer["data"])


@pytest.mark.parametrize("content", [b"{not json", b"[1]", b"", b"[" * 100_000])
def test_what_is_no_json_object_is_left_to_vllm(content):
    caller = Caller()
    assert caller.ask("POST", COMPLETIONS, content)[0] == 200
    assert caller.server.bodies == [content]


def test_uploads_are_left_alone():
    caller = Caller()
    form = [(b"content-type", b"multipart/form-data; boundary=x")]
    caller.ask("POST", COMPLETIONS, b"12345", form)
    assert caller.server.bodies == [b"12345"]


def test_where_vllm_takes_no_placement_presets_are_refused():
    caller = Caller()
    assert caller.post("/v1/messages", model="tiny:fast")[0] == 400
    assert caller.post("/v1/messages", model="alias")[0] == 200
    assert caller.post("/tokenize", model="tiny:fast", prompt="hi")[0] == 200
    assert caller.server.bodies == [{"model": "tiny"}, {"model": "tiny", "prompt": "hi"}]

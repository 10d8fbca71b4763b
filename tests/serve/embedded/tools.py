"""What the tests of the embedded engine share: a client over real HTTP, and models that say a script."""

from __future__ import annotations

import copy
import functools
import http.client
import json
import threading
import time
import weakref
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from gearshift.serve.catalog import Catalog
from gearshift.serve.embedded import EmbeddedServer, EngineSettings, listen
from gearshift.serve.embedded.engine import Load
from gearshift.supernet import SupernetCache, SupernetForCausalLM

NAME = "tiny"
PRESETS = {"teacher": "fa*3", "window": "swa*3", "fast": "gdn*3", "kimi": "kda*3", "mixed": "gdn fa swa"}
PLACEMENTS = [*PRESETS.values(), "kda swa gdn", "fa kda*2", "swa gdn fa"]
PATIENCE = 60  # seconds; reached only when something is broken
ADMIN_KEY = "the key of the administrators"


@dataclass(frozen=True)
class Reply:
    """An HTTP answer."""

    status: int
    body: bytes
    headers: dict[str, str]

    def json(self) -> Any:
        return json.loads(self.body)

    def error(self) -> dict[str, Any]:
        assert self.headers["content-type"] == "application/json"
        error = self.json()["error"]
        assert error.keys() == {"message", "type", "param", "code"}
        return error


class Client:
    """Talks to one server; every call has a connection of its own."""

    def __init__(self, port: int) -> None:
        self.port = port

    def call(self, method: str, path: str, body: Any = None, headers: dict[str, str] | None = None) -> Reply:
        connection = self._send(method, path, body, headers)
        response = connection.getresponse()
        reply = Reply(response.status, response.read(), {k.lower(): v for k, v in response.getheaders()})
        connection.close()
        return reply

    def get(self, path: str) -> Reply:
        return self.call("GET", path)

    def post(self, path: str, body: Any, **headers: str) -> Reply:
        return self.call("POST", path, body, headers)

    def complete(self, prompt: Any, **fields: Any) -> Reply:
        return self.post("/v1/completions", {"prompt": prompt, "temperature": 0, **fields})

    def choice(self, prompt: Any, **fields: Any) -> dict[str, Any]:
        reply = self.complete(prompt, **fields)
        assert reply.status == 200, reply.body
        return reply.json()["choices"][0]

    def events(self, path: str, body: dict[str, Any]) -> list[dict[str, Any]]:
        return list(self.open_stream(path, body))

    def open_stream(self, path: str, body: dict[str, Any]) -> Stream:
        connection = self._send("POST", path, {**body, "stream": True}, None)
        return Stream(connection)

    def streamed(self, prompt: Any, **fields: Any) -> str:
        events = self.events("/v1/completions", {"prompt": prompt, "temperature": 0, **fields})
        return "".join(event["choices"][0]["text"] for event in events)

    def abandon(self, path: str, body: dict[str, Any]) -> None:
        """Send a request and close the connection at once."""
        self._send("POST", path, body, None).close()

    def _send(
        self, method: str, path: str, body: Any, headers: dict[str, str] | None
    ) -> http.client.HTTPConnection:
        data = body if body is None or isinstance(body, bytes) else json.dumps(body).encode()
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=PATIENCE)
        connection.request(method, path, data, headers or {})
        return connection


class Stream:
    """The events of a streamed answer; iterating ends at ``[DONE]``."""

    def __init__(self, connection: http.client.HTTPConnection) -> None:
        self._connection = connection
        self.response = connection.getresponse()
        assert self.response.status == 200, self.response.read()
        assert self.response.getheader("content-type") == "text/event-stream; charset=utf-8"

    def __iter__(self) -> Iterator[dict[str, Any]]:
        for line in iter(self.response.readline, b""):
            if line == b"\n":
                continue
            assert line.startswith(b"data: ")
            if line == b"data: [DONE]\n":
                assert self.response.read() == b"\n"
                self._connection.close()
                return
            yield json.loads(line[len(b"data: ") :])
        raise AssertionError("the stream ended without [DONE]")

    def hang_up(self) -> None:
        self.response.close()
        self._connection.close()


class Serving:
    """A running server, and what it holds."""

    def __init__(
        self,
        model: SupernetForCausalLM,
        tokenizer: PreTrainedTokenizerBase,
        catalog: Catalog,
        settings: EngineSettings | None = None,
        admin_key: str | None = ADMIN_KEY,
    ) -> None:
        # The same weights in an object of its own, whose methods can be watched and gated.
        self.model = copy.copy(model)
        self.tokenizer = tokenizer
        self.catalog = catalog
        self.caches: weakref.WeakSet[SupernetCache] = weakref.WeakSet()
        self._watch_caches()
        self.server = EmbeddedServer(self.model, tokenizer, catalog, settings, admin_key)
        listening = listen("127.0.0.1", 0)
        self.client = Client(listening.getsockname()[1])
        self.thread = threading.Thread(target=self.server.run, args=[listening])
        self.thread.start()

    def _watch_caches(self) -> None:
        make = self.model.new_cache

        def new_cache(*args: Any, **kwargs: Any) -> SupernetCache:
            cache = make(*args, **kwargs)
            self.caches.add(cache)
            return cache

        self.model.new_cache = new_cache

    def close(self) -> None:
        self.server.stop()
        self.thread.join(PATIENCE)
        assert not self.thread.is_alive()
        assert not self.server.engine.alive
        assert not self.caches, "a cache was not freed"

    def wait_until_idle(self) -> None:
        wait_for(lambda: self.server.engine.load == Load(0, 0) and not self.caches)

    def generate(self, prompt: str | list[int], placement: str, new_tokens: int) -> list[int]:
        """The reference: Transformers' own greedy generation."""
        ids = self.tokenizer.encode(prompt) if isinstance(prompt, str) else prompt
        tokens = torch.tensor([ids])
        model: Any = self.model
        output = model.generate(
            tokens,
            attention_mask=torch.ones_like(tokens),
            placement=placement,
            max_new_tokens=new_tokens,
            do_sample=False,
        )
        return output[0, len(ids) :].tolist()

    def text(self, tokens: Sequence[int]) -> str:
        text = self.tokenizer.decode(list(tokens), skip_special_tokens=True)
        assert isinstance(text, str)
        return text

    def expected(self, prompt: str | list[int], placement: str, new_tokens: int) -> str:
        return self.text(self.generate(prompt, placement, new_tokens))


def wait_for(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.005)


@torch.no_grad()
def scripted(model: SupernetForCausalLM, script: Sequence[int]) -> SupernetForCausalLM:
    """A model that says the script, token after token, whatever the placement; its tokens are all different.

    Its layers add nothing, and each token's head is the embedding of the token before it.
    """
    assert len(set(script)) == len(script)
    model = copy.deepcopy(model)
    for name, parameter in model.named_parameters():
        if "o_proj" in name or "out_proj" in name or "down_proj" in name:
            parameter.zero_()
        if name.endswith("norm.weight") and "mixers" not in name:
            parameter.fill_(1)
    embeddings = torch.nn.functional.normalize(
        torch.randn(model.config.vocab_size or 0, 32, generator=torch.Generator().manual_seed(0)), dim=1
    )
    model.model.embed_tokens.weight.copy_(embeddings)
    model.lm_head.weight.zero_()
    for before, after in zip(script, script[1:], strict=False):
        model.lm_head.weight[after] = embeddings[before]
    return model


class Gate:
    """Lets a model run only so many forward passes, until it is opened."""

    def __init__(self, model: SupernetForCausalLM) -> None:
        self._model = model
        self._passes = threading.Semaphore(0)
        self._open = False
        self._before = vars(model).get("forward")
        forward = model.forward

        @functools.wraps(forward)
        def gated(*args: Any, **kwargs: Any) -> Any:
            while not self._open and not self._passes.acquire(timeout=0.01):
                pass
            return forward(*args, **kwargs)

        model.forward = gated

    def let(self, passes: int) -> None:
        self._passes.release(passes)

    def open(self) -> None:
        self._open = True

    def __enter__(self) -> Gate:
        return self

    def __exit__(self, *error: object) -> None:
        self.open()
        del self._model.forward
        if self._before is not None:
            self._model.forward = self._before

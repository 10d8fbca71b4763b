"""Presets over HTTP: an ASGI middleware for vLLM's OpenAI server.

A request's ``model`` may be the served name, or ``NAME:preset``; a placement may be spelled out. The
middleware turns both into what vLLM understands, the served name and ``vllm_xargs.placement``, and answers
what does not fit itself, so that the engine never sees it. It also lists the presets in ``/v1/models``.

The plugin adds it by itself when it serves a supernet; ``--middleware
gearshift.serve.vllm.middleware.PresetMiddleware`` does the same by hand.
"""

from __future__ import annotations

import json
from collections.abc import Awaitable, Callable, MutableMapping
from pathlib import Path
from typing import Any, cast

from gearshift.placement import Placement
from gearshift.serve.catalog import DEFAULT_LABEL, SEPARATOR, Catalog, RequestError, placement_of_body

Message = MutableMapping[str, Any]
Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

MODELS_PATH = "/v1/models"
# Below these, vLLM hands ``vllm_xargs`` to the engine; below the others a placement would be lost.
_PLACED_PATHS = ("/v1/completions", "/v1/chat/completions", "/v1/responses")
# A text has the same tokens under every preset.
_UNPLACED_PATHS = ("/tokenize", "/detokenize")
# Statuses of somebody who may not ask at all.
_REFUSED = (401, 403)


class PresetMiddleware:
    """See the module's docstring.

    Args:
        app: what comes next.
        catalog: what is served, and ``aliases``, further names of the model; by default both are read from
        the
            server's own state at the first request.
    """

    def __init__(self, app: App, catalog: Catalog | None = None, aliases: tuple[str, ...] = ()) -> None:
        self._app = app
        self._catalog, self._aliases = catalog, aliases

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one connection."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        if self._catalog is None:
            self._catalog, self._aliases = catalog_of_server(cast(Any, scope["app"]).state)
        if scope["method"] == "GET" and scope["path"].rstrip("/") == MODELS_PATH:
            await self._list_models(scope, receive, send)
        elif scope["method"] == "POST" and _is_json(scope):
            await self._rewrite(scope, receive, send)
        else:
            await self._app(scope, receive, send)

    async def _rewrite(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on in vLLM's words, or answer that it does not fit."""
        content = await _read(receive)
        if content is None:
            return
        try:
            body = json.loads(content)
        except (ValueError, RecursionError):
            body = None  # vLLM says what is wrong with it
        if isinstance(body, dict):
            try:
                content = json.dumps(self._translated(scope["path"], body)).encode()
            except RequestError as error:
                await self._refuse(error, scope, receive, send)
                return
        await self._app(_with_length(scope, len(content)), _once(content, receive), send)

    def _translated(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        """The body with the served name and the placement's text.

        Raises:
            RequestError: the model is not served, or the placement does not fit, there or at all.
        """
        catalog, model = self._served(), body.get("model")
        if model is not None and not isinstance(model, str):
            return body  # vLLM says that it should be a text
        choice = catalog.resolve(self._canonical(model), placement_of_body(body))
        kept = {key: value for key, value in body.items() if key not in ("placement", "model")}
        renamed = kept if model is None else {**kept, "model": catalog.name}
        if path.startswith(_PLACED_PATHS):
            arguments = {**(body.get("vllm_xargs") or {}), "placement": str(choice.placement)}
            return {**renamed, "vllm_xargs": arguments}
        if choice.label != DEFAULT_LABEL and not path.startswith(_UNPLACED_PATHS):
            raise RequestError(
                f"{path} knows no presets; use {', '.join(_PLACED_PATHS)}, or name {catalog.name!r} alone",
                "model",
            )
        return renamed

    def _canonical(self, model: str | None) -> str | None:
        """The model's first name in place of another one of its names."""
        for alias in self._aliases if model is not None else ():
            if model == alias:
                return self._served().name
            if cast(str, model).startswith(alias + SEPARATOR):
                return self._served().name + cast(str, model)[len(alias) :]
        return model

    async def _refuse(self, error: RequestError, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer an error, but only to somebody who may ask: messages tell what there is."""
        probe = {**scope, "method": "GET", "path": MODELS_PATH, "raw_path": MODELS_PATH.encode()}
        status, headers, content = await _answer_of(self._app, _with_length(probe, 0), receive)
        if status not in _REFUSED:
            status, content = error.status, json.dumps(error.to_json()).encode()
            headers = [(b"content-type", b"application/json"), *_encoded(error.headers)]
        await _send(send, status, headers, content)

    async def _list_models(self, scope: Scope, receive: Receive, send: Send) -> None:
        """The list that vLLM gives, and each preset behind the model's entry."""
        status, headers, content = await _answer_of(self._app, scope, receive)
        if status == 200:
            content = json.dumps(self._with_presets(json.loads(content))).encode()
        await _send(send, status, headers, content)

    def _with_presets(self, answer: dict[str, Any]) -> dict[str, Any]:
        models, cards = self._served().models(), answer["data"]
        base = next((card for card in cards if card["id"] == self._served().name), None)
        if base is None:
            return answer

        def card(name: str, placement: Placement) -> dict[str, Any]:
            return {**base, "id": name, "placement": str(placement)}

        others = [other for other in cards if other is not base]
        return {**answer, "data": [*(card(*model) for model in models.items()), *others]}

    def _served(self) -> Catalog:
        assert self._catalog is not None
        return self._catalog


def catalog_of_server(state: Any) -> tuple[Catalog, tuple[str, ...]]:  # noqa: ANN401 - of Starlette
    """What a running vLLM server serves, and its further names."""
    names = [path.name for path in state.openai_serving_models.base_model_paths]
    model = state.vllm_config.model_config
    if Path(model.model).is_dir():
        catalog = Catalog.from_directory(Path(model.model), names[0])
    else:  # fetched from a hub: its presets are not here
        config = model.hf_config
        catalog = Catalog(names[0], config.placement_space, default=Placement.parse(config.placement))
    return catalog, tuple(names[1:])


def _is_json(scope: Scope) -> bool:
    kinds = [value for name, value in scope["headers"] if name.lower() == b"content-type"]
    return not kinds or kinds[0].split(b";")[0].strip().lower() == b"application/json"


async def _read(receive: Receive) -> bytes | None:
    """The whole body; None if the client has gone."""
    parts, more = [], True
    while more:
        message = await receive()
        if message["type"] != "http.request":
            return None
        parts.append(message.get("body", b""))
        more = message.get("more_body", False)
    return b"".join(parts)


def _once(content: bytes, receive: Receive) -> Receive:
    """A body that is read already; after it whatever comes, such as that the client goes."""
    waiting = [content]

    async def again() -> Message:
        if waiting:
            return {"type": "http.request", "body": waiting.pop(), "more_body": False}
        return await receive()

    return again


def _with_length(scope: Scope, length: int) -> Scope:
    headers = [(name, value) for name, value in scope["headers"] if name.lower() != b"content-length"]
    return {**scope, "headers": [*headers, (b"content-length", str(length).encode())]}


async def _answer_of(
    app: App, scope: Scope, receive: Receive
) -> tuple[int, list[tuple[bytes, bytes]], bytes]:
    """The answer of what comes next, held back: status, headers but the length, body."""
    started: Message = {}
    parts: list[bytes] = []

    async def keep(message: Message) -> None:
        if message["type"] == "http.response.start":
            started.update(message)
        else:
            parts.append(message.get("body", b""))

    await app(scope, _once(b"", receive), keep)
    headers = [(name, value) for name, value in started["headers"] if name.lower() != b"content-length"]
    return started["status"], headers, b"".join(parts)


async def _send(send: Send, status: int, headers: list[tuple[bytes, bytes]], content: bytes) -> None:
    lengths = [(b"content-length", str(len(content)).encode())]
    await send({"type": "http.response.start", "status": status, "headers": headers + lengths})
    await send({"type": "http.response.body", "body": content})


def _encoded(headers: Any) -> list[tuple[bytes, bytes]]:  # noqa: ANN401 - a mapping of texts
    return [(name.lower().encode(), value.encode()) for name, value in headers.items()]

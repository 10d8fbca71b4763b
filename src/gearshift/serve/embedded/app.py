"""The HTTP application: routes, models, administration of presets, and OpenAI's form for every error."""

from __future__ import annotations

import hmac
import time
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, ClassVar

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.routing import Route

from gearshift.placement import Placement
from gearshift.presets import Preset, PresetError
from gearshift.serve.catalog import ModelNotFoundError, RequestError, shortened
from gearshift.serve.embedded.bodies import PresetBody, parse_body
from gearshift.serve.embedded.channel import read_body
from gearshift.serve.embedded.service import Service


class UnauthorizedError(RequestError):
    """The key of an administrator is missing or wrong."""

    status = 401
    code = "invalid_api_key"
    headers: ClassVar[Mapping[str, str]] = MappingProxyType({"WWW-Authenticate": "Bearer"})


def build_app(service: Service, admin_key: str | None) -> Starlette:
    """The application.

    Args:
        service: answers completions and chats.
        admin_key: lets presets be added and removed; None leaves these routes out.
    """
    models = _Models(service)
    routes = [
        Route("/health", models.health),
        Route("/metrics", models.metrics),
        Route("/v1/models", models.list),
        Route("/v1/models/{model:path}", models.show),
        Route("/v1/completions", service.completions, methods=["POST"]),
        Route("/v1/chat/completions", service.chat, methods=["POST"]),
    ]
    if admin_key is not None:
        administration = _Administration(service, admin_key)
        routes += [
            Route("/v1/presets", administration.add, methods=["POST"]),
            Route("/v1/presets/{name}", administration.remove, methods=["DELETE"]),
        ]
    handlers = {RequestError: _request_error, HTTPException: _http_error, Exception: _bug}
    return Starlette(routes=routes, exception_handlers=handlers)  # pyright: ignore[reportArgumentType] - each takes its own


class _Models:
    """What is served, and how it is."""

    def __init__(self, service: Service) -> None:
        self._service = service
        self._created = int(time.time())

    async def health(self, request: Request) -> Response:
        alive = self._service.engine.alive
        return JSONResponse({"status": "ok" if alive else "stopped"}, 200 if alive else 503)

    async def metrics(self, request: Request) -> Response:
        return PlainTextResponse(self._service.metrics.text(self._service.engine.load))

    async def list(self, request: Request) -> Response:
        models = self._service.catalog.models()
        return JSONResponse({"object": "list", "data": [self._model(*row) for row in models.items()]})

    async def show(self, request: Request) -> Response:
        name = request.path_params["model"]
        models = self._service.catalog.models()
        if name not in models:
            raise ModelNotFoundError(f"the model {shortened(name)!r} is not served; see /v1/models", "model")
        return JSONResponse(self._model(name, models[name]))

    def _model(self, name: str, placement: Placement) -> dict[str, Any]:
        return {
            "id": name,
            "object": "model",
            "created": self._created,
            "owned_by": "gearshift",
            "root": self._service.catalog.name,
            "max_model_len": self._service.texts.context,
            "placement": str(placement),
        }


class _Administration:
    """Adds and removes presets for whoever has the key."""

    def __init__(self, service: Service, key: str) -> None:
        self._service = service
        self._key = key.encode()

    async def add(self, request: Request) -> Response:
        self._check_key(request)
        body = parse_body(PresetBody, await read_body(request, self._service.most_bytes))
        catalog = self._service.catalog
        placement = catalog.parse(body.placement)
        try:
            preset = Preset(body.name, placement)
        except PresetError as error:
            raise RequestError(str(error), "name") from None
        catalog.add_preset(preset)
        return JSONResponse({"name": preset.name, "placement": str(placement)}, 201)

    async def remove(self, request: Request) -> Response:
        self._check_key(request)
        removed = self._service.catalog.remove_preset(request.path_params["name"])
        return JSONResponse({"name": removed.name, "deleted": True})

    def _check_key(self, request: Request) -> None:
        scheme, _, key = request.headers.get("authorization", "").partition(" ")
        # In constant time, so that nobody can find the key letter by letter.
        right = hmac.compare_digest(key.strip().encode("utf-8", "surrogateescape"), self._key)
        if scheme.lower() != "bearer" or not right:
            raise UnauthorizedError("expected the header 'Authorization: Bearer KEY' with the server's key")


def _request_error(request: Request, error: RequestError) -> Response:
    return JSONResponse(error.to_json(), error.status, headers=dict(error.headers))


def _http_error(request: Request, error: HTTPException) -> Response:
    """A path that is not there, or a method that it does not have."""
    told = RequestError(f"{request.method} {shortened(request.url.path)}: {error.detail}")
    return JSONResponse(told.to_json(), error.status_code, headers=error.headers)


def _bug(request: Request, error: Exception) -> Response:
    """A bug of ours; Starlette raises it once more, so that it gets into the log with its traceback."""
    error_json = {"message": "the server failed; see its log", "type": "server_error", "param": None}
    return JSONResponse({"error": {**error_json, "code": "failed"}}, 500)

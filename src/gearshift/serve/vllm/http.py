"""Puts `gearshift.serve.vllm.middleware` into vLLM's HTTP server when it serves a supernet."""

from __future__ import annotations

import functools
import sys
from typing import Any

from gearshift.serve.vllm.guards import expect_signature
from gearshift.serve.vllm.middleware import PresetMiddleware

SERVER = "vllm.entrypoints.openai.api_server"
MIDDLEWARE = f"{PresetMiddleware.__module__}.{PresetMiddleware.__qualname__}"


def offer_presets() -> None:
    """Let the server that this process is about to build, if it is one, know presets; may be called again.

    vLLM takes middlewares from its command line only. Called while the engine's settings are completed, which
    is before the server builds its application.
    """
    server: Any = sys.modules.get(SERVER)
    if server is None or hasattr(server.build_app, "__wrapped__"):
        return
    build_app = server.build_app
    expect_signature(build_app, "args")

    @functools.wraps(build_app)
    def build_with_presets(args: Any, *others: Any, **named: Any) -> Any:  # noqa: ANN401 - vLLM's
        if MIDDLEWARE not in args.middleware:
            args.middleware = [*args.middleware, MIDDLEWARE]
        return build_app(args, *others, **named)

    server.build_app = build_with_presets

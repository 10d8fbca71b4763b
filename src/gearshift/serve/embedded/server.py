"""The embedded server: a model, its engine and its HTTP application on one socket."""

from __future__ import annotations

import asyncio
import socket

import uvicorn
from starlette.applications import Starlette
from transformers import PreTrainedTokenizerBase

from gearshift.serve.catalog import Catalog
from gearshift.serve.embedded.app import build_app
from gearshift.serve.embedded.engine import Engine, EngineSettings
from gearshift.serve.embedded.service import Defaults, Service
from gearshift.serve.embedded.texts import Texts, end_tokens
from gearshift.supernet import SupernetForCausalLM

# How long requests may take to come to their end once the server is told to stop.
GRACE_SECONDS = 5


class EmbeddedServer:
    """Serves one supernet; its engine runs from the start, HTTP while :meth:`run` does.

    Args:
        model: on its device.
        tokenizer: the supernet's.
        catalog: its name and presets.
        settings: how much to take on.
        admin_key: lets presets be added and removed; None for nobody.
    """

    def __init__(
        self,
        model: SupernetForCausalLM,
        tokenizer: PreTrainedTokenizerBase,
        catalog: Catalog,
        settings: EngineSettings | None = None,
        admin_key: str | None = None,
    ) -> None:
        assert model.config.vocab_size is not None
        texts = Texts(tokenizer, model.config.vocab_size, model.config.max_position_embeddings)
        self.engine = Engine(model, texts.decode, settings)
        service = Service(catalog, self.engine, texts, _defaults(model, tokenizer))
        self._http = _HttpServer(build_app(service, admin_key), self.engine)

    def run(self, listening: socket.socket) -> None:
        """Answer requests until told to stop; then requests have `GRACE_SECONDS` to come to their end.

        Raises:
            KeyboardInterrupt: Ctrl-C told it to stop, and it did.
        """
        try:
            self._http.run(sockets=[listening])
        finally:
            self.engine.close()

    def stop(self) -> None:
        """Tell :meth:`run` to come to its end; may be called from any thread."""
        self._http.should_exit = True


class _HttpServer(uvicorn.Server):
    """Uvicorn, which tells clients why their answers end when it does."""

    def __init__(self, app: Starlette, engine: Engine) -> None:
        config = uvicorn.Config(
            app,
            http="h11",
            ws="none",
            lifespan="off",
            log_level="warning",
            access_log=False,
            # The engine ends its requests before; this is for clients that do not take their answers.
            timeout_graceful_shutdown=GRACE_SECONDS + 1,
        )
        super().__init__(config)
        self._engine = engine

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """See uvicorn."""
        asyncio.get_running_loop().call_later(GRACE_SECONDS, self._engine.stop)
        await super().shutdown(sockets)


def _defaults(model: SupernetForCausalLM, tokenizer: PreTrainedTokenizerBase) -> Defaults:
    """What the supernet's ``generation_config.json`` recommends, as vLLM does it."""
    config = model.generation_config
    assert config is not None
    return Defaults(
        temperature=1.0 if config.temperature is None else config.temperature,
        top_p=1.0 if config.top_p is None else config.top_p,
        top_k=0 if config.top_k is None else config.top_k,
        end_tokens=end_tokens(config, tokenizer),
    )


def listen(host: str, port: int) -> socket.socket:
    """A socket that waits for connections; port 0 lets the system choose one.

    Raises:
        OSError: the address is in use, or not this machine's.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    return socket.create_server((host, port), family=family)

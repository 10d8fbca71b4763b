"""From the engine's thread to a request's coroutine, and word of a client that has gone."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator

from starlette.requests import ClientDisconnect, Request

from gearshift.serve.catalog import RequestError
from gearshift.serve.embedded.generation import Piece


class Channel:
    """The pieces of one request, on their way between threads. Make it where it is read."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._queue: asyncio.Queue[Piece | RequestError] = asyncio.Queue()

    def put(self, item: Piece | RequestError) -> None:
        """Called by the engine's thread."""
        # When the server has gone, its loop is closed, and nobody waits for the item.
        with contextlib.suppress(RuntimeError):
            self._loop.call_soon_threadsafe(self._queue.put_nowait, item)

    async def pieces(self, sequences: int) -> AsyncIterator[Piece]:
        """Every piece, until each of so many sequences has ended.

        Raises:
            RequestError: the engine gave the request up.
        """
        while sequences:
            item = await self._queue.get()
            if isinstance(item, RequestError):
                raise item
            sequences -= item.finish_reason is not None
            yield item


async def client_gone(request: Request) -> None:
    """Return when the client has closed the connection; the request's body must have been read."""
    while (await request.receive())["type"] != "http.disconnect":
        pass


async def read_body(request: Request, most_bytes: int) -> bytes:
    """The body of a request, never more of it in memory than it may have.

    Raises:
        RequestError: it is longer than ``most_bytes``, or the client went away.
    """
    body = bytearray()
    try:
        async for chunk in request.stream():
            body += chunk
            if len(body) > most_bytes:
                raise BodyTooLargeError(f"the body is longer than {most_bytes:,} bytes; send less")
    except ClientDisconnect:
        raise RequestError("the client closed the connection before the body was there") from None
    return bytes(body)


class BodyTooLargeError(RequestError):
    """A body that no prompt of this model can need."""

    status = 413

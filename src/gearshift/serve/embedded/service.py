"""Completions and chats: from a checked body to sequences, and from the engine's pieces to an answer."""

from __future__ import annotations

import asyncio
import json
import secrets
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field, replace

from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.types import Receive, Scope, Send

from gearshift.serve.catalog import Catalog, Choice, RequestError, placement_of_body
from gearshift.serve.embedded.answers import Answer, ChatForm, CompletionForm, Form, Json, usage
from gearshift.serve.embedded.bodies import (
    COMPLETION_TOKENS,
    ChatBody,
    CompletionBody,
    GenerationBody,
    parse_body,
)
from gearshift.serve.embedded.channel import Channel, client_gone, read_body
from gearshift.serve.embedded.engine import Engine, Job
from gearshift.serve.embedded.generation import Sampling, Wanted
from gearshift.serve.embedded.metrics import Metrics
from gearshift.serve.embedded.texts import Texts

# A body may have so many bytes, and so many more for each token of the context.
_BODY_BYTES = 4 << 20
_BODY_BYTES_PER_TOKEN = 64

Prompt = tuple[int, ...]


@dataclass(frozen=True)
class Defaults:
    """What is done when a request does not say.

    Attributes:
        temperature: see :class:`Sampling`, as the next two.
        top_p: as of ``generation_config.json``.
        top_k: likewise.
        end_tokens: those that end a text unless ``ignore_eos`` is set.
    """

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    end_tokens: frozenset[int] = frozenset()


@dataclass
class Exchange:
    """One request and what came of it so far.

    Attributes:
        choice: what runs it.
        form: how it is answered.
        prompt_tokens: tokens of its prompts, each prompt counted once.
        answers: one a sequence.
        outcome: for the metrics.
    """

    choice: Choice
    form: Form
    prompt_tokens: int
    answers: list[Answer]
    channel: Channel
    job: Job
    outcome: str = field(default="aborted")

    @property
    def new_tokens(self) -> int:
        """Tokens generated."""
        return sum(len(answer.pieces) for answer in self.answers)

    @property
    def usage(self) -> Json:
        """OpenAI's object of token counts."""
        return usage(self.prompt_tokens, self.new_tokens)

    async def collect(self) -> AsyncIterator[Answer]:
        """Add every piece to its answer as it comes, and give the answer's last piece out.

        Raises:
            RequestError: the engine gave up.
        """
        try:
            async for piece in self.channel.pieces(len(self.answers)):
                self.answers[piece.index].add(piece)
                yield self.answers[piece.index].last()
        except RequestError:
            self.outcome = "failed"
            raise
        self.outcome = "completed"


class Service:
    """Answers completions and chats.

    Args:
        catalog: what is served.
        engine: what runs it.
        texts: reads prompts.
        defaults: for what requests leave open.
    """

    def __init__(self, catalog: Catalog, engine: Engine, texts: Texts, defaults: Defaults) -> None:
        self.catalog = catalog
        self.engine = engine
        self.texts = texts
        self.metrics = Metrics()
        self._defaults = defaults
        self.most_bytes = _BODY_BYTES + _BODY_BYTES_PER_TOKEN * texts.context

    async def completions(self, request: Request) -> Response:
        """``POST /v1/completions``."""
        body = parse_body(CompletionBody, await read_body(request, self.most_bytes))

        def read() -> list[Prompt]:
            return [self.texts.read_prompt(prompt) for prompt in body.prompt]

        return await self._answer(request, body, CompletionForm, read, COMPLETION_TOKENS)

    async def chat(self, request: Request) -> Response:
        """``POST /v1/chat/completions``."""
        body = parse_body(ChatBody, await read_body(request, self.most_bytes))

        def read() -> list[Prompt]:
            return [self.texts.read_chat([message.model_dump() for message in body.messages])]

        return await self._answer(request, body, ChatForm, read, self.texts.context)

    async def _answer(
        self,
        request: Request,
        body: GenerationBody,
        form: type[Form],
        read: Callable[[], list[Prompt]],
        default_tokens: int,
    ) -> Response:
        spelled_out = placement_of_body({"placement": body.placement, "vllm_xargs": body.vllm_xargs})
        choice = self.catalog.resolve(body.model, spelled_out)
        prompts = await run_in_threadpool(read)
        wanted = self._wanted(body, choice, prompts, default_tokens)
        with_usage = bool(body.stream and body.stream_options and body.stream_options.include_usage)
        model = body.model or self.catalog.name
        answering = form(model, self.texts.token_text, body.alternatives is not None, with_usage)
        channel = Channel()
        job = self.engine.submit(wanted, channel.put)
        answers = [Answer() for _ in wanted]
        exchange = Exchange(choice, answering, sum(map(len, prompts)), answers, channel, job)
        if body.stream:
            return _EventStream(_events(exchange), lambda: self._end(exchange))
        return await self._whole(request, exchange)

    def _wanted(
        self, body: GenerationBody, choice: Choice, prompts: list[Prompt], default_tokens: int
    ) -> list[Wanted]:
        """The sequences that a request wants: ``n`` for each prompt."""
        count = body.n or 1
        sampling = self._sampling(body)
        wanted = []
        for number, prompt in enumerate(prompts):
            room = self.texts.context - len(prompt)
            tokens = body.new_tokens or min(default_tokens, room)
            self.texts.room(len(prompt), tokens)
            for index in range(count):
                own = replace(sampling, max_tokens=tokens, seed=sampling.seed + index)
                wanted.append(Wanted(number * count + index, prompt, choice.placement, own))
        return wanted

    def _sampling(self, body: GenerationBody) -> Sampling:
        """What a body says; the number of tokens depends on the prompt and is filled in later."""
        default = self._defaults
        end_tokens = frozenset(body.stop_token_ids or ())
        return Sampling(
            max_tokens=1,
            temperature=default.temperature if body.temperature is None else body.temperature,
            top_p=default.top_p if body.top_p is None else body.top_p,
            top_k=max(default.top_k if body.top_k is None else body.top_k, 0),
            seed=secrets.randbits(62) if body.seed is None else body.seed,
            stop=tuple(body.stop or ()),
            end_tokens=end_tokens if body.ignore_eos else end_tokens | default.end_tokens,
            logprobs=body.alternatives,
            prompt_logprobs=body.scores_prompt,
        )

    async def _whole(self, request: Request, exchange: Exchange) -> Response:
        """The answer in one piece; given up as soon as the client goes away."""
        answering = asyncio.create_task(_collect_all(exchange))
        going = asyncio.create_task(client_gone(request))
        try:
            await asyncio.wait((answering, going), return_when=asyncio.FIRST_COMPLETED)
            if not answering.done():
                return Response(status_code=499)  # nobody reads it; proxies log this number for it
            await answering
        finally:
            answering.cancel()
            going.cancel()
            self._end(exchange)
        return JSONResponse(exchange.form.whole(exchange.answers, exchange.usage))

    def _end(self, exchange: Exchange) -> None:
        """Free what an exchange still holds, and count it."""
        self.engine.abort(exchange.job)
        label, outcome = exchange.choice.label, exchange.outcome
        self.metrics.count(label, outcome, exchange.prompt_tokens, exchange.new_tokens)


async def _collect_all(exchange: Exchange) -> None:
    async for _ in exchange.collect():
        pass


async def _events(exchange: Exchange) -> AsyncIterator[str]:
    """The answer as server-sent events."""
    form = exchange.form
    for index in range(len(exchange.answers)):
        for chunk in form.opening(index):
            yield _event(chunk)
    try:
        async for latest in exchange.collect():
            piece = latest.pieces[0]
            if piece.text or piece.finish_reason or form.logprobs:
                yield _event(form.chunk(latest))
        for chunk in form.closing(exchange.usage):
            yield _event(chunk)
    except RequestError as error:
        yield _event(error.to_json())
    yield "data: [DONE]\n\n"


def _event(content: Json) -> str:
    return f"data: {json.dumps(content, ensure_ascii=False, separators=(',', ':'))}\n\n"


class _EventStream(StreamingResponse):
    """Server-sent events; ``ended`` is called however the stream ends, even before it began."""

    def __init__(self, events: AsyncIterator[str], ended: Callable[[], None]) -> None:
        super().__init__(events, media_type="text/event-stream", headers={"Cache-Control": "no-cache"})
        self._ended = ended

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._ended()

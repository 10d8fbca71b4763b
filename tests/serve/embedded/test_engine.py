"""Turns, limits and failures, without HTTP."""

from __future__ import annotations

import gc
import threading
import time
import weakref
from collections.abc import Iterator, Sequence
from typing import Any

import pytest
from transformers import PreTrainedTokenizerBase

from gearshift.placement import Placement
from gearshift.serve.catalog import RequestError
from gearshift.serve.embedded.engine import (
    BusyError,
    Engine,
    EngineSettings,
    FailedError,
    Job,
    Load,
    StoppedError,
)
from gearshift.serve.embedded.generation import Piece, Sampling, Wanted
from gearshift.supernet import SupernetForCausalLM
from tests.serve.embedded.tools import Gate, Serving, wait_for

FA, GDN = Placement.parse("fa*3"), Placement.parse("gdn*3")
GREEDY = Sampling(4, temperature=0.0)


def want(
    prompt: Sequence[int] = (5, 6, 7), placement: Placement = FA, sampling: Sampling = GREEDY, index: int = 0
) -> Wanted:
    return Wanted(index, tuple(prompt), placement, sampling)


class Listener:
    """What one request was given, in order; ``shared`` notes the order among several."""

    def __init__(self, name: str = "", shared: list[str] | None = None) -> None:
        self.items: list[Piece | RequestError] = []
        self.done = threading.Event()
        self._name, self._shared = name, shared
        self.sequences = 1

    def __call__(self, item: Piece | RequestError) -> None:
        self.items.append(item)
        if self._shared is not None:
            self._shared.append(self._name)
        ends = sum(isinstance(item, Piece) and item.finish_reason is not None for item in self.items)
        if isinstance(item, RequestError) or ends == self.sequences:
            self.done.set()

    @property
    def tokens(self) -> list[int]:
        assert self.done.wait(60)
        return [item.token.id for item in self.items if isinstance(item, Piece)]

    @property
    def error(self) -> RequestError:
        assert self.done.wait(60)
        (error,) = [item for item in self.items if isinstance(item, RequestError)]
        assert self.items[-1] is error
        return error


class Engines:
    """Makes engines, and looks after them."""

    def __init__(self, model: SupernetForCausalLM, tokenizer: PreTrainedTokenizerBase) -> None:
        import copy

        self.model = copy.copy(model)
        self.caches: weakref.WeakSet[Any] = weakref.WeakSet()
        make = self.model.new_cache
        self.model.new_cache = lambda *a, **k: self._noted(make(*a, **k))
        self._decode = lambda ids: str(tokenizer.decode(ids))
        self.made: list[Engine] = []

    def _noted(self, cache: Any) -> Any:
        self.caches.add(cache)
        return cache

    def __call__(self, **settings: int) -> Engine:
        engine = Engine(self.model, self._decode, EngineSettings(**settings))
        self.made.append(engine)
        return engine


@pytest.fixture
def engines(model: SupernetForCausalLM, tokenizer: PreTrainedTokenizerBase) -> Iterator[Engines]:
    engines = Engines(model, tokenizer)
    yield engines
    for engine in engines.made:
        engine.close()
        assert engine.load == Load(0, 0)
    gc.collect()
    assert not engines.caches


def test_sequences_take_turns(engines: Engines):
    engine, order = engines(), []
    a, b = Listener("a", order), Listener("b", order)
    with Gate(engines.model):
        engine.submit([want()], a)
        wait_for(lambda: engine.load == Load(0, 1))
        engine.submit([want(placement=GDN)], b)
    assert len(a.tokens) == len(b.tokens) == 4
    assert order == list("abababab")


def test_a_long_prompt_does_not_keep_others_waiting(engines: Engines):
    engine, order = engines(prefill_tokens=10), []
    long, short = Listener("L", order), Listener("s", order)
    with Gate(engines.model):
        engine.submit([want([7] * 95)], long)
        engine.submit([want(sampling=Sampling(8, temperature=0.0))], short)
    assert len(long.tokens) == 4
    assert order == list("ssssssssLLLL")


def test_no_more_run_than_may(engines: Engines):
    engine, order = engines(max_running=2), []
    with Gate(engines.model) as gate:
        listeners = [Listener(name, order) for name in "abc"]
        for listener in listeners:
            engine.submit([want()], listener)
        gate.let(1)
        wait_for(lambda: engine.load == Load(1, 2))
    assert all(len(listener.tokens) == 4 for listener in listeners)
    assert order == list("ababababcccc")


def test_there_is_only_so_much_room_to_wait(engines: Engines):
    engine = engines(max_running=1, max_waiting=2)
    with Gate(engines.model) as gate:
        listeners = [Listener() for _ in range(3)]
        for listener in listeners:
            engine.submit([want()], listener)
        wait_for(lambda: engine.load == Load(2, 1))
        with pytest.raises(BusyError, match="2 sequences are waiting already"):
            engine.submit([want()], Listener())
        gate.open()
        assert all(len(listener.tokens) == 4 for listener in listeners)
        engine.submit([want()], again := Listener())
        assert len(again.tokens) == 4


def test_a_request_that_can_never_wait_is_told(engines: Engines):
    with pytest.raises(RequestError, match="3 sequences in one request .* expected at most 2") as raised:
        engines(max_waiting=2).submit([want(index=index) for index in range(3)], Listener())
    assert raised.value.status == 400


def test_a_failure_is_one_requests_own(engines: Engines, monkeypatch: pytest.MonkeyPatch):
    forward = engines.model.forward

    def fail_sometimes(*args: Any, placement: Placement, **kwargs: Any) -> Any:
        if placement == GDN:
            raise RuntimeError("a secret of the machine")
        return forward(*args, placement=placement, **kwargs)

    monkeypatch.setattr(engines.model, "forward", fail_sometimes)
    engine = engines()
    good, bad = Listener(), Listener()
    bad.sequences = 3
    with Gate(engines.model):
        engine.submit([want()], good)
        engine.submit([want(index=0), want(placement=GDN, index=1), want(index=2)], bad)
    assert len(good.tokens) == 4
    assert isinstance(bad.error, FailedError)
    assert "RuntimeError" in str(bad.error)
    assert "secret" not in str(bad.error)
    wait_for(lambda: engine.load == Load(0, 0))
    assert engine.alive
    engine.submit([want()], after := Listener())
    assert after.tokens == good.tokens


def test_the_other_sequences_of_a_failed_request_get_no_more_turns(
    engines: Engines, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(engines.model, "new_cache", lambda *_: 1 / 0)
    engine, bad = engines(max_running=2), Listener()
    with Gate(engines.model):
        engine.submit([want(index=index) for index in range(5)], bad)
        assert isinstance(bad.error, FailedError)
        assert engine.load == Load(0, 0)


def test_a_failure_to_make_room_is_one_requests_own(engines: Engines, monkeypatch: pytest.MonkeyPatch):
    engine = engines()

    def no_room(*args: Any) -> Any:
        raise MemoryError

    with monkeypatch.context() as patched:
        patched.setattr(engines.model, "new_cache", no_room)
        engine.submit([want()], bad := Listener())
        assert isinstance(bad.error, FailedError)
    engine.submit([want()], good := Listener())
    assert len(good.tokens) == 4


def started(engine: Engine, count: int, **wanted: Any) -> tuple[Job, Listener]:
    listener = Listener()
    listener.sequences = count
    return engine.submit([want(index=index, **wanted) for index in range(count)], listener), listener


def test_an_aborted_request_is_gone_wherever_it_was(engines: Engines):
    engine = engines(max_running=2)
    with Gate(engines.model) as gate:
        first, _ = started(engine, 2)
        _, stays = started(engine, 1)
        waits, _ = started(engine, 2)
        gate.let(2)
        wait_for(lambda: engine.load == Load(3, 2) and len(engines.caches) == 2)
        engine.abort(waits)
        assert engine.load == Load(1, 2)
        engine.abort(first)
        gate.let(1)
        wait_for(lambda: engine.load == Load(0, 1))
        gate.open()
        assert len(stays.tokens) == 4
        engine.abort(first)
    wait_for(lambda: engine.load == Load(0, 0))


def test_closing_ends_every_request(engines: Engines):
    engine = engines(max_running=2)
    with Gate(engines.model) as gate:
        listeners = [started(engine, 2)[1] for _ in range(2)]
        gate.let(3)
        engine.stop()
        gate.open()
        assert all(isinstance(listener.error, StoppedError) for listener in listeners)
    engine.close()
    assert not engine.alive
    with pytest.raises(StoppedError):
        engine.submit([want()], Listener())


def test_an_idle_engine_sleeps(engines: Engines):
    engines()
    before = time.process_time()
    time.sleep(0.2)
    assert time.process_time() - before < 0.1


def test_a_finished_request_holds_nothing_when_its_last_piece_is_there(serving: Serving):
    for _ in range(20):
        serving.client.complete("x", max_tokens=1)
        assert serving.server.engine.load == Load(0, 0)
        assert not serving.caches

"""Clients that go away, servers that are full, presets that vanish: others never notice."""

from __future__ import annotations

import threading
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from gearshift.placement import Placement
from gearshift.presets import Preset
from gearshift.serve.embedded import server
from gearshift.serve.embedded.engine import Load
from tests.serve.embedded.conftest import Serve
from tests.serve.embedded.tools import NAME, Gate, Serving, wait_for

PATH = "/v1/completions"
LONG = {"prompt": "x", "temperature": 0, "max_tokens": 100, "ignore_eos": True}


def outcomes(serving: Serving, outcome: str) -> int:
    lines = serving.client.get("/metrics").body.decode().splitlines()
    return sum(int(line.split()[-1]) for line in lines if f'outcome="{outcome}"' in line)


def wait_until_given_up(serving: Serving, gate: Gate) -> None:
    """A turn that has begun ends first, and the server may need some more to see that nobody listens."""

    def nothing_left() -> bool:
        gate.let(1)
        return serving.server.engine.load == Load(0, 0)

    wait_for(nothing_left)
    assert not serving.caches


def test_a_stream_that_is_hung_up_on_frees_its_cache(serve: Serve):
    serving = serve()
    with Gate(serving.model) as gate:
        gate.let(3)
        stream = serving.client.open_stream(PATH, {**LONG, "logprobs": 0})
        events = iter(stream)
        next(events)
        stream.hang_up()
        wait_until_given_up(serving, gate)
    assert outcomes(serving, "aborted") == 1


def test_a_client_that_does_not_wait_for_its_answer_frees_its_cache(serve: Serve):
    serving = serve(max_running=1)
    with Gate(serving.model) as gate:
        connection = serving.client._send("POST", PATH, LONG, None)
        wait_for(lambda: serving.server.engine.load == Load(0, 1))
        behind = serving.client._send("POST", PATH, {**LONG, "stream": True}, None)
        wait_for(lambda: serving.server.engine.load == Load(1, 1))
        behind.close()
        wait_for(lambda: serving.server.engine.load == Load(0, 1))
        connection.close()
        wait_until_given_up(serving, gate)
    assert outcomes(serving, "aborted") == 2


def test_many_clients_that_leave_at_once(serve: Serve):
    serving = serve()
    for stream in (False, True) * 10:
        serving.client.abandon(PATH, {**LONG, "stream": stream})
    serving.wait_until_idle()
    assert serving.client.choice("y", max_tokens=9)["text"] == serving.expected("y", "fa*3", 9)


def test_a_full_server_says_when_to_come_again(serve: Serve):
    serving = serve(max_running=1, max_waiting=1)
    with ThreadPoolExecutor() as pool, Gate(serving.model) as gate:
        answers = [pool.submit(serving.client.choice, "a", max_tokens=5)]
        wait_for(lambda: serving.server.engine.load == Load(0, 1))
        answers.append(pool.submit(serving.client.choice, "a", max_tokens=5))
        wait_for(lambda: serving.server.engine.load == Load(1, 1))
        for fields in ({}, {"stream": True}):
            reply = serving.client.complete("a", **fields)
            assert reply.status == 503
            assert reply.headers["retry-after"] == "1"
            error = reply.error()
            assert (error["type"], error["code"]) == ("server_error", "overloaded")
        gate.open()
        assert [answer.result()["text"] for answer in answers] == [serving.expected("a", "fa*3", 5)] * 2
    assert serving.client.complete("a", max_tokens=5).status == 200


def test_presets_come_and_go_under_load(serve: Serve):
    """A request keeps the placement it began with; names that are gone are 404, and nothing else happens."""
    serving = serve()
    expected = {text: serving.expected("x", text, 12) for text in ("swa fa gdn", "kda*3")}
    stop = threading.Event()

    def churn() -> None:
        while not stop.is_set():
            for text in expected:
                serving.catalog.add_preset(Preset("now", Placement.parse(text)))
                time.sleep(0.004)
                serving.catalog.remove_preset("now")

    def ask(number: int) -> str:
        body = {"prompt": "x", "max_tokens": 12, "model": f"{NAME}:now", "temperature": 0}
        reply = serving.client.post(PATH, body)
        if reply.status == 404:
            assert reply.error()["code"] == "model_not_found"
            return ""
        assert reply.status == 200
        return reply.json()["choices"][0]["text"]

    churning = threading.Thread(target=churn)
    churning.start()
    try:
        with ThreadPoolExecutor(4) as pool:
            said = set(pool.map(ask, range(40)))
    finally:
        stop.set()
        churning.join()
    assert said <= {"", *expected.values()}
    assert said & set(expected.values())


def test_a_preset_that_is_removed_goes_on_in_the_stream_that_uses_it(serve: Serve):
    serving = serve()
    with Gate(serving.model) as gate:
        gate.let(4)
        body = {"prompt": "x", "temperature": 0, "max_tokens": 20, "model": f"{NAME}:fast", "logprobs": 0}
        events = iter(serving.client.open_stream(PATH, body))
        said = next(events)["choices"][0]["text"]
        serving.catalog.remove_preset("fast")
        assert serving.client.complete("x", model=f"{NAME}:fast").status == 404
        gate.open()
        said += "".join(event["choices"][0]["text"] for event in events)
    assert said == serving.expected("x", "gdn*3", 20)


@pytest.mark.parametrize("stream", [False, True])
def test_an_exception_is_a_500_of_one_request(serve: Serve, stream: bool):
    serving = serve()
    forward = serving.model.forward

    def fail_on_kda(*args: Any, placement: Any = None, **kwargs: Any) -> Any:
        if set(placement) == {"kimi_delta_attention"} and kwargs["past_key_values"].length > 4:
            raise RuntimeError("broken")
        return forward(*args, placement=placement, **kwargs)

    serving.model.forward = fail_on_kda
    with ThreadPoolExecutor() as pool:
        other = pool.submit(serving.client.choice, "x", max_tokens=30)
        body = {"prompt": "x", "model": f"{NAME}:kimi", "max_tokens": 30, "temperature": 0}
        if stream:
            error = serving.client.events(PATH, body)[-1]["error"]
        else:
            reply = serving.client.post(PATH, body)
            assert reply.status == 500
            error = reply.error()
        assert (error["type"], error["code"]) == ("server_error", "failed")
        assert other.result()["text"] == serving.expected("x", "fa*3", 30)
    assert serving.client.get("/health").status == 200
    assert outcomes(serving, "failed") == 1


def test_a_bug_in_the_front_is_a_500_in_the_same_form(serve: Serve, monkeypatch: pytest.MonkeyPatch):
    serving = serve()
    monkeypatch.setattr(serving.catalog, "resolve", lambda *_: 1 / 0)
    reply = serving.client.complete("x")
    assert reply.status == 500
    assert reply.error()["code"] == "failed"
    monkeypatch.undo()
    assert serving.client.complete("x").status == 200


def test_stopping_lets_requests_finish(serve: Serve):
    serving = serve()
    with ThreadPoolExecutor() as pool, Gate(serving.model) as gate:
        answer = pool.submit(serving.client.choice, "x", max_tokens=20)
        wait_for(lambda: serving.server.engine.load == Load(0, 1))
        serving.server.stop()
        gate.open()
        said = answer.result()["text"]
    serving.thread.join(60)
    assert said == serving.expected("x", "fa*3", 20)


@pytest.mark.parametrize("stream", [False, True])
def test_stopping_tells_those_that_do_not(serve: Serve, monkeypatch: pytest.MonkeyPatch, stream: bool):
    monkeypatch.setattr(server, "GRACE_SECONDS", 0.2)
    serving = serve()
    with ThreadPoolExecutor() as pool, Gate(serving.model) as gate:
        gate.let(3)
        if stream:
            answer = pool.submit(serving.client.events, PATH, LONG)
        else:
            answer = pool.submit(serving.client.post, PATH, LONG)
        wait_for(lambda: serving.server.engine.load == Load(0, 1))
        serving.server.stop()
        wait_for(lambda: not serving.server.engine.alive)
        gate.open()
        result = answer.result()
    if isinstance(result, list):
        error = result[-1]["error"]
    else:
        assert result.status == 503
        error = result.error()
    assert error["code"] == "stopped"

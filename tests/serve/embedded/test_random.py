"""Fifty random requests, some of clients that leave: each says what it says alone, and nothing is left."""

from __future__ import annotations

import random
from concurrent.futures import ThreadPoolExecutor

import pytest

from tests.serve.embedded.conftest import Serve
from tests.serve.embedded.tools import Serving

REQUESTS = 50
PATH = "/v1/completions"


def run_one(serving: Serving, seed: int) -> str:
    """One random request; says how it ended."""
    rng = random.Random(seed)
    placement = str(serving.model.placement_space.sample_composition(rng))
    prompt = [rng.randrange(1, 257) for _ in range(rng.randint(1, 60))]
    new_tokens = rng.randint(1, 40)
    stop = rng.choice([None, None, chr(rng.randrange(32, 127)), "e"])
    body = {
        "prompt": prompt,
        "max_tokens": new_tokens,
        "temperature": 0,
        "placement": placement,
        "stop": stop,
    }
    form = rng.choice(["whole", "whole", "stream", "stream", "hang up", "leave"])
    if form == "leave":
        serving.client.abandon(PATH, {**body, "stream": rng.random() < 0.5})
        return "left"
    if form == "hang up":
        stream = serving.client.open_stream(PATH, body)
        for _, _ in zip(range(rng.randint(0, 5)), stream, strict=False):
            pass
        stream.hang_up()
        return "hung up"
    if form == "stream":
        events = serving.client.events(PATH, body)
        said = "".join(event["choices"][0]["text"] for event in events)
    else:
        said = serving.client.post(PATH, body).json()["choices"][0]["text"]
    text = serving.expected(prompt, placement, new_tokens)
    assert said == (text.partition(stop)[0] if stop else text), (seed, body)
    return "stopped" if stop and stop in text else "ended"


@pytest.mark.parametrize("max_running", [3, 16])
def test_random_requests(serve: Serve, max_running: int):
    serving = serve(max_running=max_running, max_waiting=REQUESTS, prefill_tokens=32)
    with ThreadPoolExecutor(12) as pool:
        ends = list(pool.map(lambda seed: run_one(serving, seed), range(REQUESTS)))
    assert set(ends) == {"left", "hung up", "stopped", "ended"}
    serving.wait_until_idle()

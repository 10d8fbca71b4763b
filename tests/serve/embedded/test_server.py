"""What surrounds the generation of text: health, models, metrics, presets."""

from __future__ import annotations

import re
from typing import Any

import pytest

from gearshift.serve.embedded.bodies import _NOT_HERE, CompletionBody
from tests.serve.embedded.conftest import Serve
from tests.serve.embedded.tools import ADMIN_KEY, NAME, PRESETS, Reply, Serving

RIGHT = {"Authorization": f"Bearer {ADMIN_KEY}"}


def test_health(serving: Serving):
    reply = serving.client.get("/health")
    assert (reply.status, reply.json()) == (200, {"status": "ok"})


def test_health_says_when_the_engine_has_gone(serve: Serve):
    serving = serve()
    serving.server.engine.close()
    reply = serving.client.get("/health")
    assert (reply.status, reply.json()) == (503, {"status": "stopped"})
    assert serving.client.complete("x").status == 503


def test_models(serving: Serving):
    models = serving.client.get("/v1/models").json()
    assert models["object"] == "list"
    assert {model["id"]: model["placement"] for model in models["data"]} == {
        NAME: "fa*3",
        **{f"{NAME}:{name}": placement for name, placement in PRESETS.items()},
    }
    for model in models["data"]:
        assert model["object"] == "model"
        assert model["max_model_len"] == 128
        assert serving.client.get(f"/v1/models/{model['id']}").json() == model
    missing = serving.client.get("/v1/models/other")
    assert missing.status == 404
    assert missing.error()["code"] == "model_not_found"


def test_metrics_count_requests_and_tokens_by_preset(serve: Serve):
    client = serve().client
    client.complete("abc", model=f"{NAME}:fast", max_tokens=5)
    client.complete(["abc", "de"], model=f"{NAME}:fast", max_tokens=2, n=2)
    client.events("/v1/completions", {"prompt": "abc", "placement": "kda*3", "max_tokens": 4})
    client.complete("abc", max_tokens=1)
    reply = client.get("/metrics")
    assert reply.headers["content-type"].startswith("text/plain")
    counted = dict(re.findall(r"^(\w+\S*) (\d+)$", reply.body.decode(), re.MULTILINE))
    assert counted == {
        'gearshift_requests_total{preset="fast",outcome="completed"}': "2",
        'gearshift_requests_total{preset="(placement)",outcome="completed"}': "1",
        'gearshift_requests_total{preset="(default)",outcome="completed"}': "1",
        'gearshift_prompt_tokens_total{preset="fast"}': "8",
        'gearshift_prompt_tokens_total{preset="(placement)"}': "3",
        'gearshift_prompt_tokens_total{preset="(default)"}': "3",
        'gearshift_generation_tokens_total{preset="fast"}': "13",
        'gearshift_generation_tokens_total{preset="(placement)"}': "4",
        'gearshift_generation_tokens_total{preset="(default)"}': "1",
        "gearshift_sequences_running": "0",
        "gearshift_sequences_waiting": "0",
    }


def add(serving: Serving, name: object, placement: object, headers: dict[str, str] = RIGHT) -> Reply:
    body = {"name": name, "placement": placement}
    return serving.client.call("POST", "/v1/presets", body, headers)


def remove(serving: Serving, name: str, headers: dict[str, str] = RIGHT) -> Reply:
    return serving.client.call("DELETE", f"/v1/presets/{name}", headers=headers)


def test_presets_come_and_go(serve: Serve):
    serving = serve()
    reply = add(serving, "new", "swa kda*2")
    assert (reply.status, reply.json()) == (201, {"name": "new", "placement": "swa kda*2"})
    assert add(serving, "new", ["sliding_attention", "kda", "kda"]).status == 201
    said = serving.client.choice("x", model=f"{NAME}:new", max_tokens=8)["text"]
    assert said == serving.expected("x", "swa kda*2", 8)
    taken = add(serving, "new", "fa*3")
    assert (taken.status, taken.error()["code"]) == (409, "preset_exists")
    assert remove(serving, "new").json() == {"name": "new", "deleted": True}
    assert serving.client.complete("x", model=f"{NAME}:new").status == 404
    assert remove(serving, "new").status == 404


@pytest.mark.parametrize(
    ("name", "placement", "param"),
    [
        ("new", "fa*4", "placement"),
        ("new", "fa " * 350_000, "placement"),
        ("new", None, "placement"),
        ("a:b", "fa*3", "name"),
        ("", "fa*3", "name"),
        ("x" * 201, "fa*3", "name"),
        (5, "fa*3", "name"),
    ],
)
def test_presets_that_cannot_be_are_400(serving: Serving, name: Any, placement: Any, param: str):
    reply = add(serving, name, placement)
    assert reply.status == 400
    assert reply.error()["param"] == param
    assert serving.catalog.presets.keys() == PRESETS.keys()


@pytest.mark.parametrize(
    "headers",
    [
        {},
        {"Authorization": ADMIN_KEY},
        {"Authorization": f"Basic {ADMIN_KEY}"},
        {"Authorization": "Bearer "},
        {"Authorization": f"Bearer {ADMIN_KEY[:-1]}"},
        {"Authorization": f"Bearer {ADMIN_KEY}x"},
        {"Authorization": "Bearer \xe9\xff"},
    ],
)
def test_nobody_else_changes_presets(serving: Serving, headers: dict[str, str]):
    for reply in (add(serving, "new", "fa*3", headers), remove(serving, "fast", headers)):
        assert reply.status == 401
        assert reply.headers["www-authenticate"] == "Bearer"
        assert reply.error()["code"] == "invalid_api_key"
    assert serving.catalog.presets.keys() == PRESETS.keys()


def test_without_a_key_there_is_no_administration(serve: Serve):
    serving = serve(admin_key=None)
    for reply in (add(serving, "new", "fa*3"), remove(serving, "fast")):
        assert reply.status == 404
    assert serving.catalog.presets.keys() == PRESETS.keys()


def test_what_is_refused_is_not_also_done():
    assert not _NOT_HERE.keys() & CompletionBody.model_fields.keys()

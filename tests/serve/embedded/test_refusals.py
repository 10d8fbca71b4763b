"""What is wrong with a request is said in OpenAI's form, and nothing of it reaches the engine."""

from __future__ import annotations

from typing import Any

import pytest

from tests.serve.embedded.tools import NAME, Serving

PATH = "/v1/completions"


def refused(serving: Serving, fields: dict[str, Any], status: int = 400) -> dict[str, Any]:
    reply = serving.client.post(PATH, {"prompt": "x", "max_tokens": 2, **fields})
    assert reply.status == status, reply.body
    error = reply.error()
    assert error["type"] == "invalid_request_error"
    return error


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"prompt": None}, "expected a text, a list of tokens"),
        ({"prompt": 5}, "expected a text"),
        ({"prompt": ["a", 5]}, "expected a text"),
        ({"prompt": [True]}, "expected a text"),
        ({"prompt": [1.0]}, "expected a text"),
        ({"prompt": [[1], ["a"]]}, "expected a text"),
        ({"prompt": ""}, "the prompt is empty"),
        ({"prompt": []}, "the prompt is empty"),
        ({"prompt": ["a", ""]}, "the prompt is empty"),
        ({"prompt": [257]}, "the token 257; expected 0 to 256"),
        ({"prompt": [-1]}, "the token -1"),
        ({"prompt": [10**30]}, "the token 1000"),
        ({"model": 5}, "valid string; given 5"),
        ({"max_tokens": 0}, "greater than or equal to 1"),
        ({"max_tokens": 2.5}, "valid integer"),
        ({"max_tokens": "2"}, "valid integer; given '2'"),
        ({"max_tokens": True}, "valid integer"),
        ({"temperature": -0.1}, "greater than or equal to 0"),
        ({"temperature": 2.1}, "less than or equal to 2"),
        ({"temperature": "hot"}, "valid number; given 'hot'"),
        ({"top_p": 0}, "greater than 0"),
        ({"top_p": 1.1}, "less than or equal to 1"),
        ({"top_k": -2}, "greater than or equal to -1"),
        ({"seed": 2**63}, "less than 9223372036854775808"),
        ({"n": 0}, "greater than or equal to 1"),
        ({"n": 100}, "expected at most 64"),
        ({"stop": ""}, "1 to 1000 characters"),
        ({"stop": ["x"] * 17}, "at most 16"),
        ({"stop": ["x" * 1001]}, "1 to 1000 characters"),
        ({"stop": 5}, "valid array"),
        ({"stop_token_ids": "x"}, "valid array"),
        ({"ignore_eos": "yes"}, "valid boolean"),
        ({"stream": 1}, "valid boolean"),
        ({"logprobs": 21}, "less than or equal to 20"),
        ({"stream_options": 5}, "object"),
        ({"best_of": 2}, "the embedded engine has no best_of; leave it out"),
        ({"echo": True}, "has no echo"),
        ({"suffix": "y"}, "has no suffix"),
        ({"presence_penalty": 0.5}, "has no presence_penalty"),
        ({"logit_bias": {"5": 1}}, "has no logit_bias"),
    ],
)
def test_a_wrong_value_is_400_with_the_name_of_its_field(serving: Serving, fields: dict[str, Any], said: str):
    error = refused(serving, fields)
    (name,) = fields
    assert (error["param"] or "").partition(".")[0] == name
    assert said in error["message"]


@pytest.mark.parametrize(
    ("body", "said"),
    [
        (b"", "is no JSON"),
        (b"{", "is no JSON"),
        (b"\xff\xfe", "is no JSON"),
        (b'{"prompt": "x", "max_tokens": 1' + b"0" * 5000 + b"}", "is no JSON"),
        (b'{"prompt": "x", "temperature": NaN}', "temperature: Input should be a finite number"),
        (b'{"prompt": "x", "top_p": 1e999}', "top_p: Input should be a finite number"),
        (b'{"prompt": "\\ud800"}', "is no JSON"),
        (b"[" * 100_000, "is no JSON"),
        (b'"prompt"', "is no JSON object"),
        (b"[1]", "is no JSON object"),
        (b"{}", "prompt: Field required"),
    ],
    ids=range(11),
)
def test_a_body_that_is_none(serving: Serving, body: bytes, said: str):
    reply = serving.client.post(PATH, body)
    assert reply.status == 400
    assert said in reply.error()["message"]


def test_neutral_values_and_fields_that_nobody_knows_are_ignored(serving: Serving):
    neutral = {"best_of": 1, "echo": False, "presence_penalty": 0.0, "logit_bias": {}, "suffix": None}
    fields = {"user": "ada", "metadata": {"a": 1}, "stop": None, "n": None, "seed": None, "logprobs": None}
    plain = serving.client.choice("x", max_tokens=4)
    assert serving.client.choice("x", max_tokens=4, **neutral, **fields) == plain


@pytest.mark.parametrize("name", [f"{NAME}:quick", "other", ""])
def test_what_is_not_served_is_404_with_the_presets(serving: Serving, name: str):
    error = refused(serving, {"model": name}, 404)
    assert error["code"] == "model_not_found"
    assert error["message"].endswith("teacher, window, fast, kimi, mixed")


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"placement": "fa*4"}, "has 4 layers; expected 3"),
        ({"vllm_xargs": {"placement": "fa*2 mamba"}}, "unknown mixer 'mamba'"),
        ({"vllm_xargs": {"placement": 3}}, "of type int"),
        ({"vllm_xargs": "fa*3"}, "vllm_xargs is no object"),
        ({"vllm_xargs": {"placement": "fa*3"}, "placement": "swa*3"}, "differ; give one of them"),
        ({"model": f"{NAME}:fast", "placement": "fa*3"}, "also spells out 'fa*3'"),
        ({"placement": "fa " * 350_000}, "a placement of 1,050,000 characters"),
    ],
)
def test_a_placement_that_does_not_fit_is_400(serving: Serving, fields: dict[str, Any], said: str):
    error = refused(serving, fields)
    assert error["code"] == "invalid_placement"
    assert said in error["message"]
    assert len(error["message"]) < 500


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"prompt": "x" * 128}, "a prompt of 128 tokens and 1 new ones; expected at most 128"),
        ({"prompt": [5] * 200}, "a prompt of 200 tokens"),
        ({"prompt": "x" * 100, "max_tokens": 29}, "a prompt of 100 tokens and 29 new ones"),
        ({"prompt": ["x", "x" * 127]}, "a prompt of 127 tokens and 2 new ones"),
        ({"max_tokens": 10**30}, "and 1000000"),
    ],
)
def test_longer_than_the_context_is_400(serving: Serving, fields: dict[str, Any], said: str):
    error = refused(serving, fields)
    assert error["code"] == "context_length_exceeded"
    assert said in error["message"]


def test_a_body_beyond_all_measure_is_413(serving: Serving):
    reply = serving.client.post(PATH, b" " * (5 << 20))
    assert reply.status == 413
    assert "longer than" in reply.error()["message"]


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/", 404),
        ("GET", "/v1/engines", 404),
        ("POST", "/v1/" + "x" * 2000, 404),
        ("GET", PATH, 405),
        ("DELETE", "/v1/models", 405),
        ("GET", "/v1/presets", 405),
    ],
)
def test_paths_that_are_not_there(serving: Serving, method: str, path: str, status: int):
    reply = serving.client.call(method, path)
    assert reply.status == status
    assert len(reply.error()["message"]) < 500


def test_nothing_of_this_reached_the_engine(serving: Serving):
    """The last test of this file: only what was right has been counted."""
    counted = serving.client.get("/metrics").body.decode()
    requests = [line for line in counted.splitlines() if line.startswith("gearshift_requests_total")]
    assert [line.rpartition(" ")[0] for line in requests] in (
        [],
        ['gearshift_requests_total{preset="(default)",outcome="completed"}'],
    )

"""``/v1/completions`` over real HTTP against Transformers' own generation."""

from __future__ import annotations

import math
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from transformers import PreTrainedTokenizerBase

from gearshift.supernet import SupernetForCausalLM
from tests.serve.embedded.conftest import Serve
from tests.serve.embedded.test_text import byte_tokens
from tests.serve.embedded.tools import NAME, PLACEMENTS, PRESETS, Serving, scripted

PROMPT = "def f(x):"
NEW = 24


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("preset", PRESETS)
def test_a_preset_says_what_generate_says(serving: Serving, preset: str, stream: bool):
    fields = {"model": f"{NAME}:{preset}", "max_tokens": NEW}
    said = (
        serving.client.streamed(PROMPT, **fields)
        if stream
        else serving.client.choice(PROMPT, **fields)["text"]
    )
    assert said == serving.expected(PROMPT, PRESETS[preset], NEW)


def test_placements_say_different_things(serving: Serving):
    """Or else the tests of this file would show nothing."""
    assert len({serving.expected(PROMPT, placement, NEW) for placement in PLACEMENTS}) == len(PLACEMENTS)


@pytest.mark.parametrize("stream", [False, True])
def test_eight_placements_at_once_say_what_each_says_alone(serving: Serving, stream: bool):
    prompts = {placement: f"{number} {PROMPT}" for number, placement in enumerate(PLACEMENTS)}
    expected = {place: serving.expected(prompts[place], place, NEW) for place in PLACEMENTS}

    def ask(placement: str) -> str:
        fields = {"vllm_xargs": {"placement": placement}, "max_tokens": NEW}
        if stream:
            return serving.client.streamed(prompts[placement], **fields)
        return serving.client.choice(prompts[placement], **fields)["text"]

    with ThreadPoolExecutor(len(PLACEMENTS)) as pool:
        given = dict(zip(PLACEMENTS, pool.map(ask, PLACEMENTS), strict=True))
    assert given == expected


def test_a_prompt_in_stretches_says_the_same(serve: Serve):
    serving = serve(prefill_tokens=5)
    prompt = "a prompt that is read in many stretches"
    for placement in PLACEMENTS:
        given = serving.client.choice(prompt, placement=placement, max_tokens=NEW)["text"]
        assert given == serving.expected(prompt, placement, NEW)


def test_the_name_alone_and_no_name_are_the_default(serving: Serving):
    expected = serving.expected(PROMPT, "fa*3", NEW)
    assert serving.client.choice(PROMPT, model=NAME, max_tokens=NEW)["text"] == expected
    assert serving.client.choice(PROMPT, max_tokens=NEW)["text"] == expected
    assert serving.client.choice(PROMPT, model=None, max_tokens=NEW, placement=None)["text"] == expected


def test_several_prompts_and_several_answers(serving: Serving):
    tokens = serving.tokenizer.encode("second")
    reply = serving.client.complete(["first", "second"], n=2, max_tokens=5).json()
    answers = [serving.expected(prompt, "fa*3", 5) for prompt in ("first", "first", "second", "second")]
    assert [choice["text"] for choice in reply["choices"]] == answers
    assert [choice["index"] for choice in reply["choices"]] == [0, 1, 2, 3]
    assert reply["usage"] == {"prompt_tokens": 11, "completion_tokens": 20, "total_tokens": 31}
    assert serving.client.choice(tokens, max_tokens=5)["text"] == answers[2]
    many = serving.client.complete([serving.tokenizer.encode("first"), tokens], max_tokens=5).json()
    assert [choice["text"] for choice in many["choices"]] == answers[1:3]


def test_a_stream_of_several_answers_keeps_them_apart(serving: Serving):
    body = {"prompt": ["first", "second"], "temperature": 0, "max_tokens": 5, "n": 2}
    texts = dict.fromkeys(range(4), "")
    ends: list[int] = []
    for event in serving.client.events("/v1/completions", body):
        (choice,) = event["choices"]
        texts[choice["index"]] += choice["text"]
        ends += [choice["index"]] * (choice["finish_reason"] == "length")
    assert list(texts.values()) == [
        serving.expected(p, "fa*3", 5) for p in ("first", "first", "second", "second")
    ]
    assert sorted(ends) == [0, 1, 2, 3]


def test_the_forms_of_an_answer(serving: Serving):
    # Sampled, so one answer in some hundreds would end by itself.
    whole = serving.client.complete(PROMPT, model=f"{NAME}:fast", max_tokens=3, ignore_eos=True).json()
    assert whole["object"] == "text_completion"
    assert whole["model"] == f"{NAME}:fast"
    assert whole["id"].startswith("cmpl-")
    assert whole["choices"][0].keys() == {"index", "text", "logprobs", "finish_reason"}
    assert whole["usage"] == {"prompt_tokens": 9, "completion_tokens": 3, "total_tokens": 12}
    body = {
        "prompt": PROMPT,
        "max_tokens": 3,
        "ignore_eos": True,
        "stream_options": {"include_usage": True},
    }
    *chunks, last = serving.client.events("/v1/completions", body)
    assert {chunk["id"] for chunk in [*chunks, last]} == {last["id"]}
    assert all(chunk["usage"] is None for chunk in chunks)
    assert [chunk["choices"][0]["finish_reason"] for chunk in chunks][-1] == "length"
    assert last["choices"] == []
    assert last["usage"] == {"prompt_tokens": 9, "completion_tokens": 3, "total_tokens": 12}
    del body["stream_options"]
    assert all("usage" not in chunk for chunk in serving.client.events("/v1/completions", body))


def test_sixteen_tokens_or_what_there_is_room_for(serving: Serving):
    assert serving.client.complete(PROMPT).json()["usage"]["completion_tokens"] == 16
    reply = serving.client.complete("x" * 120).json()
    assert reply["usage"]["total_tokens"] == 128
    assert reply["choices"][0]["finish_reason"] == "length"
    assert serving.client.complete("x" * 120, max_tokens=8).status == 200


def test_sampling_repeats_with_its_seed(serving: Serving):
    fields = {"temperature": 1.5, "top_p": 0.9, "top_k": 50, "n": 2, "max_tokens": 12}

    def ask(**more: int) -> list[str]:
        reply = serving.client.complete(PROMPT, **fields, **more).json()
        return [choice["text"] for choice in reply["choices"]]

    assert ask(seed=3) == ask(seed=3)
    assert ask(seed=3) != ask(seed=4)
    assert len({*ask(seed=3), *ask(), *ask()}) == 6
    greedy = serving.expected(PROMPT, "fa*3", 12)
    assert serving.client.choice(PROMPT, temperature=2, top_k=1, max_tokens=12)["text"] == greedy


@torch.no_grad()
def test_logprobs_are_those_of_one_forward_pass(serving: Serving):
    choice = serving.client.choice(PROMPT, model=f"{NAME}:kimi", max_tokens=6, logprobs=2)
    new = serving.generate(PROMPT, "kda*3", 6)
    ids = torch.tensor([serving.tokenizer.encode(PROMPT) + new])
    expected = serving.model(ids, placement="kda*3").logits[0, -7:-1].log_softmax(-1)
    logprobs = choice["logprobs"]
    assert logprobs["tokens"] == [serving.tokenizer.decode([token]) for token in new]
    for row, token, given, top in zip(
        expected, new, logprobs["token_logprobs"], logprobs["top_logprobs"], strict=True
    ):
        assert given == pytest.approx(float(row[token]), abs=1e-4)
        assert math.isclose(max(top.values()), float(row.max()), abs_tol=1e-4)
        assert 1 <= len(top) <= 2
    assert logprobs["text_offset"][0] == 0
    body = {"prompt": PROMPT, "model": f"{NAME}:kimi", "temperature": 0, "max_tokens": 6, "logprobs": 2}
    streamed = [event["choices"][0]["logprobs"] for event in serving.client.events("/v1/completions", body)]
    for key in ("tokens", "token_logprobs", "top_logprobs", "text_offset"):
        assert [value for part in streamed for value in part[key]] == logprobs[key]


def script(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    return byte_tokens(tokenizer, text.encode())


@pytest.mark.parametrize(
    ("fields", "said", "reason", "tokens"),
    [
        ({}, "bcdé€😀XYZ", "stop", 16),
        ({"stop": "cd"}, "b", "stop", 3),
        ({"stop": ["YZW", "éx", "€😀X"]}, "bcdé", "stop", 13),
        ({"stop": ["none of it"]}, "bcdé€😀XYZ", "stop", 16),
        ({"stop": ["Z<eos>"]}, "bcdé€😀XYZ", "stop", 16),
        ({"stop": "é", "max_tokens": 4}, "bcd\ufffd", "length", 4),
        ({"max_tokens": 15}, "bcdé€😀XYZ", "length", 15),
        ({"stop": "YZW", "max_tokens": 15}, "bcdé€😀XYZ", "length", 15),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_where_a_text_ends(
    telling: Serving, fields: dict[str, object], said: str, reason: str, tokens: int, stream: bool
):
    fields = {"max_tokens": 60, **fields}
    if stream:
        body = {"prompt": "a", "temperature": 0, "stream_options": {"include_usage": True}, **fields}
        *events, last = telling.client.events("/v1/completions", body)
        choices = [event["choices"][0] for event in events]
        given = "".join(choice["text"] for choice in choices), choices[-1]["finish_reason"]
        used = last["usage"]
    else:
        reply = telling.client.complete("a", **fields).json()
        given = reply["choices"][0]["text"], reply["choices"][0]["finish_reason"]
        used = reply["usage"]
    assert given == (said, reason)
    assert used["completion_tokens"] == tokens


@pytest.fixture(scope="module")
def telling(model: SupernetForCausalLM, tokenizer: PreTrainedTokenizerBase):
    """A server whose model goes on from "a" with a text, and then with the end token."""
    from tests.serve.embedded.conftest import make_catalog

    story = scripted(model, [*script(tokenizer, "abcdé€😀XYZ"), 0])
    serving = Serving(story, tokenizer, make_catalog(model))
    yield serving
    serving.wait_until_idle()
    serving.close()


def test_characters_of_several_tokens_are_streamed_whole(telling: Serving):
    body = {"prompt": "a", "temperature": 0, "max_tokens": 60}
    texts = [event["choices"][0]["text"] for event in telling.client.events("/v1/completions", body)]
    assert texts == ["b", "c", "d", "é", "€", "😀", "X", "Y", "Z", ""]


def test_a_stop_token_ends_a_text_and_is_not_in_it(telling: Serving):
    (token,) = script(telling.tokenizer, "X")
    reply = telling.client.complete("a", max_tokens=60, stop_token_ids=[token]).json()
    assert reply["choices"][0]["text"] == "bcdé€😀"
    assert reply["choices"][0]["finish_reason"] == "stop"


def test_the_end_token_can_be_ignored(telling: Serving):
    reply = telling.client.complete("a", max_tokens=40, ignore_eos=True).json()
    assert reply["choices"][0]["finish_reason"] == "length"
    assert reply["usage"]["completion_tokens"] == 40
    (token,) = script(telling.tokenizer, "X")
    stopped = telling.client.choice("a", max_tokens=40, ignore_eos=True, stop_token_ids=[token])
    assert (stopped["text"], stopped["finish_reason"]) == ("bcdé€😀", "stop")


@pytest.mark.parametrize("prefill_tokens", [4, 128])
def test_prompts_are_scored_as_by_one_forward_pass(serve: Serve, prefill_tokens: int):
    serving = serve(prefill_tokens=prefill_tokens)
    tokens = [5, 80, 7, 99, 12, 40, 41, 3, 77]
    choice = serving.client.choice(tokens, model=f"{NAME}:mixed", max_tokens=2, prompt_logprobs=0)
    told = choice["prompt_logprobs"]
    assert told[0] is None and len(told) == len(tokens)
    with torch.no_grad():
        logits = serving.model(torch.tensor([tokens]), placement=PRESETS["mixed"]).logits[0]
    expected = logits.log_softmax(-1)[range(8), tokens[1:]].tolist()
    found = [entry[str(token)]["logprob"] for token, entry in zip(tokens[1:], told[1:], strict=True)]
    assert found == pytest.approx(expected, abs=1e-4)
    assert "prompt_logprobs" not in serving.client.choice(tokens, max_tokens=1)


@pytest.mark.parametrize("more", [{"prompt_logprobs": 3}, {"prompt_logprobs": 0, "stream": True}])
def test_prompts_are_scored_plainly_or_not_at_all(serving: Serving, more: dict[str, object]):
    reply = serving.client.complete("text", **more)
    assert reply.status == 400
    assert "prompt_logprobs" in reply.error()["message"]


def test_a_chats_prompt_is_not_scored(serving: Serving):
    body = {"messages": [{"role": "user", "content": "hi"}], "prompt_logprobs": 0}
    assert (
        "send the prompt to /v1/completions"
        in serving.client.post("/v1/chat/completions", body).error()["message"]
    )

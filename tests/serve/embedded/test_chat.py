"""``/v1/chat/completions``: the tokenizer's own template, and OpenAI's forms."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import pytest
from transformers import PreTrainedTokenizerBase

from gearshift.supernet import SupernetForCausalLM
from tests.serve.embedded.conftest import make_catalog
from tests.serve.embedded.tools import NAME, Serving

TEMPLATE = """\
{%- for message in messages -%}
{%- if message.role not in ("system", "user", "assistant") -%}
{{ raise_exception("nobody knows the role " + message.role) }}
{%- endif -%}
[{{ message.role }}{{ message.name or "" }}]{{ message.content }}
{%- endfor -%}
{%- if add_generation_prompt -%}[assistant]{%- endif -%}"""
MESSAGES = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "é?"}]
PROMPT = "[system]be brief[user]é?[assistant]"
CHAT = "/v1/chat/completions"


@pytest.fixture(scope="module")
def chatting(model: SupernetForCausalLM, tokenizer: PreTrainedTokenizerBase) -> Iterator[Serving]:
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.chat_template = TEMPLATE
    serving = Serving(model, tokenizer, make_catalog(model))
    yield serving
    serving.wait_until_idle()
    serving.close()


def ask(**fields: Any) -> dict[str, Any]:
    return {"messages": MESSAGES, "temperature": 0, "max_tokens": 9, **fields}


def test_a_chat_is_its_prompt_by_the_template(chatting: Serving):
    reply = chatting.client.post(CHAT, ask(model=f"{NAME}:mixed")).json()
    assert reply["object"] == "chat.completion"
    assert reply["id"].startswith("chatcmpl-")
    (choice,) = reply["choices"]
    assert choice["message"] == {
        "role": "assistant",
        "content": chatting.expected(PROMPT, "gdn fa swa", 9),
    }
    assert choice["finish_reason"] == "length"
    assert reply["usage"] == {"prompt_tokens": 36, "completion_tokens": 9, "total_tokens": 45}


def test_a_stream_opens_with_the_role(chatting: Serving):
    body = ask(model=f"{NAME}:mixed", stream_options={"include_usage": True})
    first, *rest, last = chatting.client.events(CHAT, body)
    assert first["object"] == "chat.completion.chunk"
    assert first["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    said = "".join(chunk["choices"][0]["delta"]["content"] for chunk in rest)
    assert said == chatting.expected(PROMPT, "gdn fa swa", 9)
    assert rest[-1]["choices"][0]["finish_reason"] == "length"
    assert last["usage"]["total_tokens"] == 45


def test_parts_of_text_are_one_text(chatting: Serving):
    parts = [{"type": "text", "text": "be "}, {"type": "text", "text": "brief"}]
    given = chatting.client.post(CHAT, ask(messages=[{"role": "system", "content": parts}, MESSAGES[1]]))
    assert given.json()["choices"] == chatting.client.post(CHAT, ask()).json()["choices"]


def test_the_template_gets_what_else_a_message_has(chatting: Serving):
    message = {"role": "user", "content": "x", "name": " Ada"}
    reply = chatting.client.post(CHAT, ask(messages=[message])).json()
    assert reply["choices"][0]["message"]["content"] == chatting.expected("[user Ada]x[assistant]", "fa*3", 9)


def test_logprobs(chatting: Serving):
    choice = chatting.client.post(CHAT, ask(logprobs=True, top_logprobs=3)).json()["choices"][0]
    content = choice["logprobs"]["content"]
    assert len(content) == 9
    for entry in content:
        assert entry.keys() == {"token", "logprob", "bytes", "top_logprobs"}
        assert bytes(entry["bytes"]).decode() == entry["token"]
        assert [top["token"] for top in entry["top_logprobs"]][0] == entry["token"]
        assert len(entry["top_logprobs"]) == 3
    streamed = chatting.client.events(CHAT, ask(logprobs=True, top_logprobs=3))
    parts = [event["choices"][0]["logprobs"] for event in streamed]
    assert [entry for part in parts if part for entry in part["content"]] == content
    alone = chatting.client.post(CHAT, ask(logprobs=True)).json()["choices"][0]["logprobs"]["content"]
    assert all(entry["top_logprobs"] == [] for entry in alone)


def test_an_answer_may_fill_the_context_and_has_two_names_for_its_length(chatting: Serving):
    reply = chatting.client.post(CHAT, {"messages": MESSAGES, "temperature": 0}).json()
    assert reply["usage"]["total_tokens"] == 128
    reply = chatting.client.post(CHAT, ask(max_completion_tokens=4)).json()
    assert reply["usage"]["completion_tokens"] == 4


@pytest.mark.parametrize(
    ("fields", "param", "said"),
    [
        ({"messages": []}, "messages", "at least 1 item"),
        ({"messages": "hi"}, "messages", "valid array"),
        ({"messages": [{"content": "x"}]}, "messages.0.role", "Field required"),
        ({"messages": [{"role": "user", "content": 5}]}, "messages.0.content", "valid string"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages.0.content", "text"),
        ({"messages": [{"role": "judge", "content": "x"}]}, "messages", "nobody knows the role judge"),
        ({"messages": [{"role": "user", "content": "x" * 200}]}, "messages", "a prompt of"),
        ({"max_tokens": 100}, "max_tokens", "a prompt of 36 tokens and 100 new ones"),
        ({"top_logprobs": 2}, "top_logprobs", "set logprobs to true"),
        ({"logprobs": 3}, "logprobs", "valid boolean"),
        ({"tools": [{"type": "function"}]}, "tools", "has no tools"),
        ({"response_format": {"type": "json_object"}}, "response_format", "has no response_format"),
    ],
)
def test_what_is_refused(chatting: Serving, fields: dict[str, Any], param: str, said: str):
    reply = chatting.client.post(CHAT, ask(**fields))
    assert reply.status == 400
    assert reply.error()["param"] == param
    assert said in reply.error()["message"]


def test_a_tokenizer_without_a_template_cannot_chat(serving: Serving):
    reply = serving.client.post(CHAT, ask())
    assert reply.status == 400
    assert "no chat template" in reply.error()["message"]
    assert "/v1/completions" in reply.error()["message"]

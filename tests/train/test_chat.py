"""Conversations: which tokens are answers, and a run that learns from them alone."""

from __future__ import annotations

import json
import shutil

import pytest
import torch

from gearshift.placement import Placement
from gearshift.train.chat import encode_chat
from gearshift.train.documents import DataError
from gearshift.train.passes import TeacherPass
from gearshift.train.run import train
from gearshift.train.tokens import load_tokenizer
from tests.train.tools import losses, random_batch, rows

TEMPLATE = (
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
# Writes what an assistant thought only in the last turn, as some templates do.
FORGETFUL = TEMPLATE.replace("m.content", "(m.content if loop.last or m.role == 'user' else 'cut')")
TALK = [
    {"role": "user", "content": "2+2?"},
    {"role": "assistant", "content": "4"},
    {"role": "user", "content": "sure?"},
    {"role": "assistant", "content": "yes"},
]


@pytest.fixture
def tokenizer(supernet_directory):
    loaded = load_tokenizer(supernet_directory)
    loaded.chat_template = TEMPLATE
    return loaded


def test_answers_begin_after_their_prompt_and_end_with_their_turn(tokenizer):
    tokens, answers = encode_chat(tokenizer, TALK, "here")
    text = tokenizer.decode(tokens)
    assert text == "<|user|>2+2?<|end|><|assistant|>4<|end|><|user|>sure?<|end|><|assistant|>yes<|end|>"
    assert tokenizer.decode(tokens[answers]) == "4<|end|>yes<|end|>"


def test_text_of_several_bytes_stays_whole(tokenizer):
    talk = [{"role": "user", "content": "é"}, {"role": "assistant", "content": "ü→"}]
    tokens, answers = encode_chat(tokenizer, talk, "here")
    assert tokenizer.decode(tokens[answers]) == "ü→<|end|>"


@pytest.mark.parametrize(
    ("messages", "told"),
    [
        ("hello", "here: expected a list of messages"),
        ([], "expected a list of messages"),
        ([{"role": "user"}], "expected messages with 'role' and 'content'"),
        ([{"role": "user", "content": "x"}], "no message has the role 'assistant'"),
    ],
)
def test_what_is_no_conversation_is_refused(tokenizer, messages, told):
    with pytest.raises(DataError, match=told):
        encode_chat(tokenizer, messages, "here")


def test_a_template_that_changes_earlier_turns_is_told(tokenizer):
    tokenizer.chat_template = FORGETFUL
    with pytest.raises(
        DataError, match="here: the chat template writes turn 2 differently when others follow"
    ):
        encode_chat(tokenizer, TALK, "here")
    assert encode_chat(tokenizer, TALK[:2], "here")[1].any()


def test_a_tokenizer_without_a_template_is_told(tokenizer):
    tokenizer.chat_template = None
    with pytest.raises(DataError, match="no chat template; put the teacher's chat_template.jinja beside it"):
        encode_chat(tokenizer, TALK, "here")


@pytest.fixture
def talking(supernet_directory, tmp_path):
    """The tiny supernet with a chat template, and a file of conversations."""
    supernet = shutil.copytree(supernet_directory, tmp_path / "talking")
    (supernet / "chat_template.jinja").write_text(TEMPLATE)
    talks = [
        [{"role": "user", "content": f"{n}+1"}, {"role": "assistant", "content": str(n + 1)}]
        for n in range(9)
    ]
    (tmp_path / "talks.jsonl").write_text("".join(json.dumps({"messages": talk}) + "\n" for talk in talks))
    return {"supernet": supernet, "data": [tmp_path / "talks.jsonl"]}


def test_fine_tuning_learns_chosen_placements_and_answers_alone(make_recipe, talking, tmp_path):
    changes = {**talking, "sequence_length": 100, "sampling": {"presets": {"gdn*3": 1, "fa swa kda": 1}}}
    recipe = make_recipe("sft", **changes, steps=8, learning_rate=1e-2)
    train(recipe, progress=False)
    found = rows(recipe.out)
    assert {text for row in found for text in row["placements"]} == {"gdn*3", "fa swa kda"}
    assert all(0 < row["counted"] < 0.4 * 200 for row in found)
    assert all(row["loss"] == row["cross_entropy"] for row in found)
    assert "forward_kl" not in found[0]
    assert found[-1]["loss"] < 0.95 * found[0]["loss"]
    cut = make_recipe("sft", **changes, steps=8, learning_rate=1e-2, out=tmp_path / "again")
    train(cut, progress=False)
    assert losses(cut.out) == losses(recipe.out)


def test_questions_do_not_move_the_loss(make_trainer, talking):
    """Other tokens in a document that is not counted change nothing for the one beside it."""
    trainer = make_trainer("sft", **talking, sampling={"presets": {"gdn*3": 1}})
    batch = random_batch(rows=1, lengths=(12, 12))
    batch.counted[:, :12] = False

    def loss() -> float:
        sums, stage = trainer.passes.zero(), trainer.recipe.stages[0]
        placement = Placement.parse("gdn*3")
        trainer.passes.learn(batch, 11, placement, TeacherPass(None), stage.losses, sums)
        return float(sums.loss)

    before = loss()
    batch.input_ids[:, :12] = torch.randint(1, 257, (1, 12))
    assert loss() == before > 0

from __future__ import annotations

import json
import random
import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gearshift.errors import FileFormatError
from gearshift.evaluate.recall import (
    LONGEST,
    SHORTEST,
    TASKS,
    RecallError,
    RecallExample,
    encode_example,
    make_example,
    make_examples,
    make_training_text,
    read_examples,
    source_distance,
    write_examples,
)

seeds = st.integers(0, 2**32)
lengths = st.integers(SHORTEST, 6000)
fillers = st.lists(st.text(st.characters(min_codepoint=32, max_codepoint=126), max_size=90), max_size=30)


def cut(text):
    """What any byte-level tokenizer that splits digits must cut at; tokens lie within the pieces."""
    return re.findall(r" ?[A-Za-z]+|[0-9]| ?[^\sA-Za-z0-9]+|\s+(?!\S)|\s", text)


def solve(example):
    """Answer from the prompt alone, without the generator's code."""
    if example.task == "lookup":
        table, query = example.prompt.split("}\n")
        entries = re.findall(r'"(\w+)": "(\d+)"', table)
        assert len({name for name, _ in entries}) == len(entries)
        [asked] = re.findall(r'table\["(\w+)"\]', query)
        return dict(entries)[asked] + '"'
    if example.task == "needle":
        asked = example.prompt.split("\n")[-1].removeprefix("assert ").removesuffix(' == "')
        [value] = re.findall(rf'^{asked} = "(\d+)"$', example.prompt, re.MULTILINE)
        return value + '"'
    first, second = (re.findall(r'"(\w+)"', line) for line in example.prompt.split("\n"))
    assert len(set(first)) == len(first) and first[: len(second)] == second
    return "".join(f' "{item}",' for item in first[len(second) : len(second) + 4])


@settings(deadline=None, max_examples=60)
@given(st.sampled_from(TASKS), seeds, lengths, fillers)
def test_the_answer_is_in_the_prompt_once_and_can_be_worked_out(task, seed, length, filler):
    example = make_example(task, random.Random(seed), length, filler)
    assert solve(example) == example.answer
    assert example.prompt.count(example.answer) == 1
    assert example.prompt[-source_distance(example) :].startswith(example.answer)


@settings(deadline=None, max_examples=60)
@given(st.sampled_from(TASKS), seeds, lengths)
def test_prompt_and_answer_may_be_encoded_apart(task, seed, length):
    example = make_example(task, random.Random(seed), length)
    prompt, answer = encode_example(lambda text: [hash(piece) for piece in cut(text)], example)
    whole = [
        hash(piece) for piece in cut(example.prompt + example.answer + ("\n" if task != "copy" else " "))
    ]
    assert prompt + answer == whole[:-1]


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("length", [SHORTEST, 1000, 5000, LONGEST])
def test_lengths_are_about_what_was_asked_for(task, length):
    rng = random.Random(0)
    sizes = [len(make_example(task, rng, length).prompt) for _ in range(20)]
    assert 0.75 * length - 20 < min(sizes) and max(sizes) < 1.05 * length + 100
    assert 0.7 * length < len(make_training_text(task, rng, length)) < 1.05 * length + 100


@pytest.mark.parametrize("task", TASKS)
def test_the_seed_alone_decides(task):
    filler = ("x = 1", "y = 2")
    one, same, other = (make_example(task, random.Random(seed), 900, filler) for seed in (5, 5, 6))
    assert one == same != other
    one, same, other = (make_training_text(task, random.Random(seed), 900, filler) for seed in (5, 5, 6))
    assert one == same != other


@settings(deadline=None, max_examples=30)
@given(seeds, lengths)
def test_every_query_of_a_lookup_text_is_answered_from_its_table(seed, length):
    table, queries = make_training_text("lookup", random.Random(seed), length).split("}\n")
    entries = dict(re.findall(r'"(\w+)": "(\d+)"', table))
    asked = re.findall(r'assert table\["(\w+)"\] == "(\d+)"\n', queries)
    assert asked and all(entries[name] == value for name, value in asked)
    assert len(queries) == sum(len(f'assert table["{k}"] == "{v}"\n') for k, v in asked)


def test_a_copy_text_holds_the_list_twice():
    first, second, rest = make_training_text("copy", random.Random(3), 700).split("\n")
    assert first.removeprefix("first = ") == second.removeprefix("second = ") and rest == ""


@settings(deadline=None, max_examples=30)
@given(seeds, lengths)
def test_every_query_of_a_needle_text_has_its_line(seed, length):
    text = make_training_text("needle", random.Random(seed), length)
    hidden = dict(re.findall(r'^SECRET_(\w+) = "(\d+)"$', text, re.MULTILINE))
    asked = dict(re.findall(r'^assert SECRET_(\w+) == "(\d+)"$', text, re.MULTILINE))
    assert hidden and asked == hidden


def test_the_filler_is_used_and_its_secrets_are_left_out():
    filler = [f"line_{number} = 0" for number in range(20)] + ['SECRET_bako = "1111"']
    prompt = make_example("needle", random.Random(1), 1500, filler).prompt
    assert "line_7 = 0" in prompt and prompt.count("SECRET_") == 2


def test_make_examples_counts_every_task_and_length():
    examples = make_examples(2, seed=0, lengths=(300, 900))
    assert [e.task for e in examples] == [task for task in TASKS for _ in range(4)]
    assert (
        examples
        == make_examples(2, seed=0, lengths=(300, 900))
        != make_examples(2, seed=1, lengths=(300, 900))
    )


def test_an_unknown_task_or_length_is_refused():
    with pytest.raises(RecallError, match="'sort'.*lookup, copy, needle"):
        make_example("sort", random.Random(0), 500)
    for length in (SHORTEST - 1, LONGEST + 1):
        with pytest.raises(RecallError, match=str(length)):
            make_training_text("copy", random.Random(0), length)


def test_files_hold_the_examples_unchanged(tmp_path):
    examples = [*make_examples(1, seed=0), RecallExample("copy", "ü\u2028", "\n")]
    write_examples(tmp_path / "recall.jsonl", examples)
    assert read_examples(tmp_path / "recall.jsonl") == examples


@pytest.mark.parametrize(
    ("row", "complaint"),
    [
        ({"task": "copy", "prompt": "a"}, "found the keys"),
        ({"task": "copy", "prompt": "a", "answer": 3}, "three texts"),
        ({"task": "copy", "prompt": "a", "answer": ""}, "three texts"),
        ({"task": "copy", "prompt": "a", "answer": "b", "more": "c"}, "found the keys"),
        ({"task": "sort", "prompt": "a", "answer": "b"}, "unknown task 'sort'"),
    ],
)
def test_a_bad_line_is_named(tmp_path, row, complaint):
    path = tmp_path / "recall.jsonl"
    good = {"task": "copy", "prompt": "a", "answer": "b"}
    path.write_text(json.dumps(good) + "\n" + json.dumps(row) + "\n")
    with pytest.raises(FileFormatError, match=rf"recall.jsonl.* 2: .*{complaint}"):
        read_examples(path)


def test_a_missing_or_broken_file_is_named(tmp_path):
    with pytest.raises(FileFormatError, match="none.jsonl is missing"):
        read_examples(tmp_path / "none.jsonl")
    (tmp_path / "broken.jsonl").write_text("{\n")
    with pytest.raises(FileFormatError, match="broken.jsonl, line 1"):
        read_examples(tmp_path / "broken.jsonl")

"""The special tokens: of all that a directory says of them, what can be believed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, models

from gearshift.convert import ConversionError
from gearshift.convert.apriel2.token_ids import token_ids

Files = dict[str, dict[str, Any]]
GENERATION, TOKENIZER = "generation_config.json", "tokenizer_config.json"
QWEN_TOKENIZER = {
    "bos_token": None,
    "eos_token": "<|im_end|>",
    "pad_token": {"content": "<|endoftext|>", "special": True},
    "added_tokens_decoder": {"151643": {"content": "<|endoftext|>"}, "151645": {"content": "<|im_end|>"}},
}
CLASS_DEFAULTS = {"bos_token_id": 1, "eos_token_id": 2}
FOUND: dict[str, tuple[Files, dict[str, Any], tuple[Any, Any, Any]]] = {
    "nothing is known": ({}, {}, (1, 2, None)),
    "only the config": ({}, {"bos_token_id": 5, "eos_token_id": 6, "pad_token_id": 7}, (5, 6, 7)),
    "the tokenizer of Qwen2": ({TOKENIZER: QWEN_TOKENIZER}, {}, (None, 151645, 151643)),
    "the tokenizer against the class's defaults": (
        {TOKENIZER: QWEN_TOKENIZER},
        CLASS_DEFAULTS,
        (None, 151645, 151643),
    ),
    "generation comes first": (
        {GENERATION: {"eos_token_id": [8, 9], "pad_token_id": 4}, TOKENIZER: QWEN_TOKENIZER},
        CLASS_DEFAULTS,
        (None, [8, 9], 4),
    ),
    "generation that was derived from the config": (
        {GENERATION: {"_from_model_config": True, **CLASS_DEFAULTS}, TOKENIZER: QWEN_TOKENIZER},
        CLASS_DEFAULTS,
        (None, 151645, 151643),
    ),
    "a tokenizer that says nothing": ({TOKENIZER: {}}, {}, (None, None, None)),
    "a tokenizer that says nothing, and a config": ({TOKENIZER: {}}, CLASS_DEFAULTS, (1, 2, None)),
    "a token without a number": ({TOKENIZER: {"eos_token": "</s>"}}, CLASS_DEFAULTS, (1, 2, None)),
    "no token by another name": ({}, {"pad_token_id": -1}, (1, 2, None)),
    "a pad that has no row": ({}, {"pad_token_id": 200000}, (1, 2, None)),
}


def write(directory: Path, files: Files) -> Path:
    for name, content in files.items():
        (directory / name).write_text(json.dumps(content))
    return directory


@pytest.mark.parametrize(("files", "config", "expected"), FOUND.values(), ids=list(FOUND))
def test_where_they_are_found(
    files: Files, config: dict[str, Any], expected: tuple[Any, Any, Any], tmp_path: Path
):
    assert tuple(token_ids(write(tmp_path, files), config, 151936).values()) == expected


def test_the_tokenizers_own_file_knows_numbers(tmp_path: Path):
    write(tmp_path, {TOKENIZER: {"bos_token": "<s>", "eos_token": "</s>"}})
    Tokenizer(models.BPE({"a": 0, "<s>": 11, "</s>": 12}, [])).save(str(tmp_path / "tokenizer.json"))
    assert token_ids(tmp_path, {}, 99) == {"bos_token_id": 11, "eos_token_id": 12, "pad_token_id": None}


def test_a_tokenizer_that_is_none(tmp_path: Path):
    write(tmp_path, {TOKENIZER: {"eos_token": "</s>"}, "tokenizer.json": {"no": "tokenizer"}})
    with pytest.raises(ConversionError, match="tokenizer.json is no tokenizer"):
        token_ids(tmp_path, {}, 99)


@pytest.mark.parametrize("value", ["</s>", 1.5, True, [1, "2"], -7])
def test_what_is_no_id(value: object, tmp_path: Path):
    write(tmp_path, {GENERATION: {"eos_token_id": value}})
    with pytest.raises(ConversionError, match=r"generation_config.json has eos_token_id .* restore it"):
        token_ids(tmp_path, {}, 99)

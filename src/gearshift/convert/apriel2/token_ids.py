"""The special tokens of an ``apriel2`` checkpoint: its config is the last to be asked.

Exporters leave the ids out, and a program that saves such a config again writes the defaults of the format's
configuration class into it, which are those of Llama's tokenizer.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from gearshift._checks import is_count
from gearshift.convert.teachers.base import ConversionError
from gearshift.tensor_headers import file_inside, read_json_object

CONFIG, GENERATION = "config.json", "generation_config.json"
TOKENIZER, TOKENIZER_CONFIG = "tokenizer.json", "tokenizer_config.json"
CLASS_DEFAULTS = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": None}


def token_ids(directory: Path, config: dict[str, Any], vocab_size: int) -> dict[str, Any]:
    """``bos_token_id``, ``eos_token_id`` and ``pad_token_id``, from whatever knows them best.

    That is ``generation_config.json``, unless it was only derived from the config; then the tokenizer; then
    the config; and where there is no tokenizer either, the defaults of the format's configuration class.

    Raises:
        ConversionError: something else stands where an id should be.
        CheckpointError: a file is not what it should be.
    """
    generation = _read(directory, GENERATION)
    if generation.get("_from_model_config"):
        generation = {}
    tokenizer = _read(directory, TOKENIZER_CONFIG)
    has_tokenizer = any((directory / name).exists() for name in (TOKENIZER, TOKENIZER_CONFIG))
    found = {}
    for key, default in CLASS_DEFAULTS.items():
        known = _given(generation, key, directory / GENERATION)
        if known is None:
            known = _of_tokenizer(key, tokenizer, directory)
        # Where the tokenizer's config says null there is none, whatever the other one says.
        if known is None and tokenizer.get(key.removesuffix("_id"), "") is not None:
            known = _given(config, key, directory / CONFIG)
            known = default if known is None and not has_tokenizer else known
        found[key] = known
    if found["pad_token_id"] is not None and found["pad_token_id"] >= vocab_size:
        found["pad_token_id"] = None  # the embedding has no row for it, and nothing needs it
    return found


def _read(directory: Path, name: str) -> dict[str, Any]:
    return read_json_object(file_inside(directory, name)) if (directory / name).exists() else {}


def _given(fields: dict[str, Any], key: str, path: Path) -> int | list[int] | None:
    """An id, or for the end of a text several; -1 has been written for none."""
    value = fields.get(key)
    if value is None or value == -1:
        return None
    several = key == "eos_token_id" and isinstance(value, list) and bool(value)
    if not all(is_count(entry, 0) for entry in (value if several else [value])):
        raise ConversionError(f"{path} has {key} {value!r:.80}; expected a whole number: restore it")
    return value


def _of_tokenizer(key: str, tokenizer: dict[str, Any], directory: Path) -> int | None:
    """The id of the token that the tokenizer's config names; None where it names or knows none."""
    token = tokenizer.get(key.removesuffix("_id"))
    content = token.get("content") if isinstance(token, dict) else token
    if not isinstance(content, str):
        return None
    added = tokenizer.get("added_tokens_decoder")
    for number, entry in added.items() if isinstance(added, dict) else ():
        if isinstance(entry, dict) and entry.get("content") == content and number.isdecimal():
            return int(number)
    if not (directory / TOKENIZER).exists():
        return None
    path = file_inside(directory, TOKENIZER)
    try:
        return Tokenizer.from_file(str(path)).token_to_id(content)
    except Exception as error:  # noqa: BLE001 - the library raises nothing narrower
        raise ConversionError(f"{path} is no tokenizer ({error}); restore it") from None

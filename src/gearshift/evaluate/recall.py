"""Text tasks that are answered by recalling something from the prompt, written as Python code.

Mixers with a bounded memory lose exactly this ability first, so the tasks tell placements apart where the
average loss hardly does. Three kinds:

- ``lookup``: a dict literal of random names and numbers, then a query for one of its names;
- ``copy``: a list of random items, then the same list again; the answer is the next few items;
- ``needle``: one ``SECRET_name = "1234"`` line within other code, asked for at the end.

The answer occurs exactly once in the prompt, and both begin and end where a byte-level tokenizer that splits
letters, digits and punctuation must cut, so prompt and answer may be encoded apart (``encode_example``).
Randomly chosen names and digits cost many tokens: lookup and copy have about 1.8 characters a token.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from gearshift.errors import FileFormatError, GearshiftError
from gearshift.files import atomic_file, read_json_lines

TASKS = ("lookup", "copy", "needle")
SHORTEST = 200
LONGEST = 50_000
ANSWER_ITEMS = 4

_CONSONANTS = "bcdfghjklmnprstvwz"
_SYLLABLES = tuple(consonant + vowel for consonant in _CONSONANTS for vowel in "aeiou")
_NAME_COUNT = len(_SYLLABLES) ** 2
_ENTRY_LENGTH = len('    "bako": "4817",\n')
_QUERY_LENGTH = len('assert table["bako"] == "4817"\n')
_ITEM_LENGTH = len('"bako", ')
# fmt: off
_WORDS = (
    "batch", "cache", "child", "config", "count", "data", "depth", "entry", "event", "field", "filter",
    "flag", "frame", "group", "handler", "header", "index", "item", "key", "label", "layer", "level",
    "limit", "line", "list", "mask", "message", "model", "name", "node", "offset", "order", "output",
    "parent", "path", "point", "queue", "range", "reader", "request", "result", "row", "scale", "score",
    "shape", "size", "source", "state", "step", "store", "stream", "table", "target", "task", "text",
    "token", "total", "user", "value", "view", "weight", "width", "window", "worker",
)
# fmt: on


@dataclass(frozen=True)
class RecallExample:
    """One question: a model recalls if it continues ``prompt`` with ``answer``."""

    task: str
    prompt: str
    answer: str


class RecallError(GearshiftError):
    """A recall task was asked for that does not exist or cannot be made."""


def make_example(task: str, rng: random.Random, length: int, filler: Sequence[str] = ()) -> RecallExample:
    """Make one example whose prompt has about ``length`` characters.

    Args:
        task: one of ``TASKS``.
        rng: the only source of chance; the same state gives the same example.
        length: characters of the prompt, from ``SHORTEST`` to ``LONGEST``.
        filler: lines of code around the needle; without any, lines are made up.

    Raises:
        RecallError: an unknown task, or a length out of range.
    """
    _check(task, length)
    if task == "lookup":
        return _lookup_example(rng, length)
    if task == "copy":
        return _copy_example(rng, length)
    return _needle_example(rng, length, filler)


def make_examples(
    count: int,
    seed: int,
    lengths: Sequence[int] = (300, 800, 1600, 2800),
    tasks: Sequence[str] = TASKS,
    filler: Sequence[str] = (),
) -> list[RecallExample]:
    """Make ``count`` examples for every task and every length, in that order."""
    rng = random.Random(seed)
    return [make_example(task, rng, size, filler) for task in tasks for size in lengths for _ in range(count)]


def make_training_text(task: str, rng: random.Random, length: int, filler: Sequence[str] = ()) -> str:
    """Make a text of about ``length`` characters that asks and answers many questions of one task.

    It has the form of the examples, so a model trained on it meets nothing new in them.

    Raises:
        RecallError: an unknown task, or a length out of range.
    """
    _check(task, length)
    if task == "lookup":
        return _lookup_training(rng, length)
    if task == "copy":
        return _copy_training(rng, length)
    return _needle_training(rng, length, filler)


def encode_example(
    encode: Callable[[str], Sequence[int]], example: RecallExample
) -> tuple[list[int], list[int]]:
    """Encode prompt and answer apart; ``encode`` must add no special tokens.

    For tokenizers that cut between letters, digits, punctuation and white space (the byte-level ones), the
    two parts together are the encoding of the whole text.
    """
    return list(encode(example.prompt)), list(encode(example.answer))


def source_distance(example: RecallExample) -> int:
    """How many characters before the end of the prompt the answer is found."""
    return len(example.prompt) - example.prompt.rindex(example.answer)


def write_examples(path: Path, examples: Iterable[RecallExample]) -> None:
    """Write examples as JSON lines, atomically."""
    with atomic_file(path) as partial:
        partial.write_text("".join(json.dumps(asdict(e)) + "\n" for e in examples), encoding="utf-8")


def read_examples(path: Path) -> list[RecallExample]:
    """Read examples from JSON lines.

    Raises:
        FileFormatError: the file is missing or a line is no example; the message names the file and the line.
    """
    if not path.is_file():
        raise FileFormatError(f"{path} is missing; expected recall examples as JSON lines there")
    rows = read_json_lines(path)
    return [_read_row(row, f"{path}, example {number}") for number, row in enumerate(rows, start=1)]


def _read_row(row: dict[str, object], where: str) -> RecallExample:
    wanted = ("task", "prompt", "answer")
    values = [row.get(key) for key in wanted]
    if set(row) != set(wanted) or not all(isinstance(value, str) and value for value in values):
        raise FileFormatError(
            f"{where}: expected the three texts task, prompt and answer, found the keys {sorted(row)}; "
            "write the file again with gearshift.evaluate.recall.write_examples"
        )
    if row["task"] not in TASKS:
        raise FileFormatError(f"{where}: unknown task {row['task']!r}; expected one of {', '.join(TASKS)}")
    return RecallExample(*(str(value) for value in values))


def _check(task: str, length: int) -> None:
    if task not in TASKS:
        raise RecallError(f"unknown recall task {task!r}; choose one of {', '.join(TASKS)}")
    if not SHORTEST <= length <= LONGEST:
        raise RecallError(f"a length of {length} characters was given; choose from {SHORTEST} to {LONGEST}")


def _names(rng: random.Random, count: int) -> list[str]:
    """Distinct names of two syllables, such as ``bako``."""
    picks = rng.sample(range(_NAME_COUNT), count)
    return [_SYLLABLES[pick // len(_SYLLABLES)] + _SYLLABLES[pick % len(_SYLLABLES)] for pick in picks]


def _numbers(rng: random.Random, count: int) -> list[str]:
    """Distinct numbers of four digits."""
    return [f"{pick:04d}" for pick in rng.sample(range(10_000), count)]


def _table(rng: random.Random, pairs: int) -> tuple[str, list[tuple[str, str]]]:
    entries = list(zip(_names(rng, pairs), _numbers(rng, pairs), strict=True))
    return "table = {\n" + "".join(f'    "{k}": "{v}",\n' for k, v in entries) + "}\n", entries


def _lookup_example(rng: random.Random, length: int) -> RecallExample:
    text, entries = _table(rng, (length - _QUERY_LENGTH) // _ENTRY_LENGTH)
    name, value = rng.choice(entries)
    return RecallExample("lookup", f'{text}assert table["{name}"] == "', f'{value}"')


def _lookup_training(rng: random.Random, length: int) -> str:
    """A table that takes a random share of the text, and as many queries as fit into the rest."""
    at_most = (length - 2 * _QUERY_LENGTH) // _ENTRY_LENGTH
    at_least = length // (_ENTRY_LENGTH + _QUERY_LENGTH)
    text, entries = _table(rng, rng.randint(at_least, at_most))
    queries = min(len(entries), (length - len(text)) // _QUERY_LENGTH)
    return text + "".join(f'assert table["{k}"] == "{v}"\n' for k, v in rng.sample(entries, queries))


def _items(rng: random.Random, count: int) -> list[str]:
    """Distinct quoted items, names and numbers mixed."""
    names = _names(rng, count)
    numbers = _numbers(rng, count)
    return [f'"{rng.choice(pair)}",' for pair in zip(names, numbers, strict=True)]


def _copy_example(rng: random.Random, length: int) -> RecallExample:
    copied = rng.uniform(0.1, 0.8)
    count = int(length / _ITEM_LENGTH / (1 + copied))
    items = _items(rng, count)
    cut = min(max(1, int(count * copied)), count - ANSWER_ITEMS)
    prompt = f"first = [{' '.join(items)}]\nsecond = [{' '.join(items[:cut])}"
    return RecallExample("copy", prompt, "".join(" " + item for item in items[cut : cut + ANSWER_ITEMS]))


def _copy_training(rng: random.Random, length: int) -> str:
    items = " ".join(_items(rng, length // (2 * _ITEM_LENGTH)))
    return f"first = [{items}]\nsecond = [{items}]\n"


def _filler_lines(rng: random.Random, length: int, filler: Sequence[str]) -> list[str]:
    """Consecutive lines of the filler (made-up ones without any) with ``length`` characters in all."""
    lines: list[str] = []
    position = rng.randrange(len(filler)) if filler else 0
    while length > 0:
        line = filler[position % len(filler)].rstrip("\n") if filler else _made_up_line(rng)
        position += 1
        length -= len(line) + 1
        if "SECRET_" not in line:
            lines.append(line)
    return lines


def _made_up_line(rng: random.Random) -> str:
    first, second, third = rng.choice(_WORDS), rng.choice(_WORDS), rng.choice(_WORDS)
    form = rng.randrange(6)
    if form == 0:
        return f"{first} = {second}.{third}()"
    if form == 1:
        return f"if {first} > {rng.randrange(100)}: {second} = {third}"
    if form == 2:
        return f"{first} = {second} + {third} * {rng.randrange(10)}"
    if form == 3:
        return f'{first} = "{second} {third}"'
    if form == 4:
        return f"for {first} in {second}: {third}.append({first})"
    return f"{first}_{second} = get_{third}({first}, {second})"


def _hidden_values(rng: random.Random, count: int, lines: Sequence[str]) -> list[str]:
    """Numbers of which the lines contain none as the end of a text."""
    quoted = '"\n'.join(lines)
    spare = [number for number in _numbers(rng, count + 50) if f'{number}"' not in quoted]
    assert len(spare) >= count, "the filler holds nearly every number"
    return spare[:count]


def _hide(rng: random.Random, lines: list[str], count: int) -> list[tuple[str, str]]:
    """Insert ``count`` secrets into ``lines`` at random places; return their names and values."""
    secrets = list(zip(_names(rng, count), _hidden_values(rng, count, lines), strict=True))
    for name, value in secrets:
        lines.insert(rng.randint(0, len(lines)), f'SECRET_{name} = "{value}"')
    return secrets


def _needle_example(rng: random.Random, length: int, filler: Sequence[str]) -> RecallExample:
    lines = _filler_lines(rng, length - 2 * len('SECRET_bako = "4817"\n'), filler)
    [(name, value)] = _hide(rng, lines, 1)
    text = "\n".join(lines)
    return RecallExample("needle", f'{text}\nassert SECRET_{name} == "', f'{value}"')


def _needle_training(rng: random.Random, length: int, filler: Sequence[str]) -> str:
    count = rng.randint(1, min(8, length // 100))
    lines = _filler_lines(rng, length - count * 2 * len('assert SECRET_bako == "4817"\n'), filler)
    secrets = _hide(rng, lines, count)
    rng.shuffle(secrets)
    queries = [f'assert SECRET_{name} == "{value}"' for name, value in secrets]
    return "\n".join([*lines, *queries]) + "\n"

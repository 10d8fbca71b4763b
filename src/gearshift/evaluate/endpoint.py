"""Quality of what a server serves: log-likelihoods over an OpenAI-style API, as rows of the same table.

Every window of text is a prompt of tokens. Its log-likelihood comes as ``prompt_logprobs``, which vLLM and
Gearshift's own server have, or by ``echo`` with ``logprobs``, as OpenAI's first completions had.
"""

from __future__ import annotations

import json
import math
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from gearshift.errors import GearshiftError
from gearshift.evaluate.held_out import EncodedExample, HeldOut, read_held_out
from gearshift.evaluate.table import Row, append_row, read_table, select_rows
from gearshift.files import check_appendable
from gearshift.placement import FULL_ATTENTION, Placement, PlacementError
from gearshift.progress import show_progress
from gearshift.provenance import provenance
from gearshift.supernet import checkpoint_digest
from gearshift.train.tokens import load_tokenizer

TIMEOUT_SECONDS = 600.0
Decode = Callable[[list[int]], str]
# Asked for in this order, until the server has one of them.
_WAYS: tuple[dict[str, Any], ...] = ({"prompt_logprobs": 0}, {"echo": True, "logprobs": 0})


class EndpointError(GearshiftError):
    """A server cannot be reached, refuses, or does not report log-likelihoods."""


class _RefusedError(EndpointError):
    """The server answered, and said no."""


@dataclass
class Endpoint:
    """An OpenAI-style API.

    Attributes:
        url: up to and with ``/v1``.
        key: sent as a bearer token; None for none.
    """

    url: str
    key: str | None = None
    _way: dict[str, Any] | None = field(default=None, init=False)

    def models(self) -> dict[str, Placement]:
        """Served names with their placements, as Gearshift's servers tell them; others tell none.

        Raises:
            EndpointError: it cannot be reached, or its answer is not as expected.
        """
        listed = self._call("/models").get("data")
        if not isinstance(listed, list):
            raise EndpointError(f"{self.url}/models lists no models; expected an OpenAI-style API there")
        try:
            return {
                str(entry["id"]): Placement.parse(entry["placement"])
                for entry in listed
                if isinstance(entry, dict) and isinstance(entry.get("placement"), str)
            }
        except (KeyError, PlacementError) as error:
            raise EndpointError(f"{self.url}/models: {error}") from None

    def log_likelihoods(self, model: str, tokens: Sequence[int]) -> list[float]:
        """Log-likelihood of every token but the first, given those before it.

        Raises:
            EndpointError: the server has no way to report them, or cannot be reached.
        """
        ways = _WAYS if self._way is None else (self._way,)
        refusals = []
        for way in ways:
            body = {"model": model, "prompt": list(tokens), "max_tokens": 1, "temperature": 0, **way}
            try:
                found = _read_log_likelihoods(self._call("/completions", body), tokens)
            except _RefusedError as error:
                refusals.append(str(error))
                continue
            if found is not None:
                self._way = way
                return found
            refusals.append(f"{', '.join(way)} was ignored")
        raise EndpointError(f"{self.url} reports no log-likelihoods of prompts: {'; '.join(refusals)}")

    def answer(self, model: str, prompt: Sequence[int], tokens: int) -> str:
        """The most likely continuation of so many tokens."""
        body = {"model": model, "prompt": list(prompt), "max_tokens": tokens, "temperature": 0}
        found = self._call("/completions", body)
        try:
            return str(found["choices"][0]["text"])
        except (KeyError, IndexError, TypeError):
            raise EndpointError(f"{self.url} answered without a text: {json.dumps(found):.200}") from None

    def _call(self, path: str, body: dict[str, Any] | None = None) -> dict[str, Any]:
        headers = {"Content-Type": "application/json"}
        if self.key:
            headers["Authorization"] = f"Bearer {self.key}"
        data = None if body is None else json.dumps(body).encode()
        try:
            request = urllib.request.Request(self.url.rstrip("/") + path, data, headers)
            with urllib.request.urlopen(request, timeout=TIMEOUT_SECONDS) as response:
                found = json.loads(response.read())
        except urllib.error.HTTPError as error:
            told = error.read(1000).decode(errors="replace")
            raise _RefusedError(f"{self.url}{path} answered {error.code}: {told}") from None
        except (OSError, ValueError) as error:
            raise EndpointError(f"{self.url}{path} cannot be read: {error}; is the server running?") from None
        if not isinstance(found, dict):
            raise EndpointError(f"{self.url}{path} answered with no JSON object")
        return found


def _read_log_likelihoods(answer: dict[str, Any], tokens: Sequence[int]) -> list[float] | None:
    """Of the tokens behind the first, from either form of answer; None if it has neither."""
    try:
        choice = answer["choices"][0]
        by_place = choice.get("prompt_logprobs")
        if by_place is not None:
            pairs = zip(tokens[1:], by_place[1:], strict=True)
            return [float(told[str(token)]["logprob"]) for token, told in pairs]
        echoed = (choice.get("logprobs") or {}).get("token_logprobs")
        if echoed is None or len(echoed) < len(tokens):
            return None
        return [float(value) for value in echoed[1 : len(tokens)]]
    except (KeyError, IndexError, TypeError, ValueError) as error:
        raise EndpointError(f"log-likelihoods in a form that is not known: {error!r}") from None


def evaluate_endpoint(
    endpoint: Endpoint,
    models: Sequence[str] | None,
    supernet: Path,
    data: Path,
    recall: Path | None,
    out: Path,
    *,
    tokens: int = 32768,
    sequence_length: int = 512,
    progress: bool = True,
) -> list[Row]:
    """Evaluate served models and append a row for each to a table; those that are there are kept.

    Rows have no ``kl``, which takes whole distributions. Retention is over the served all-FA model.

    Args:
        endpoint: where.
        models: served names; None or empty for every one that has a placement.
        supernet: the served supernet's directory, for its tokenizer and digest.
        data: held-out documents.
        recall: recall examples, or None.
        out: the table, a JSON-lines file.
        tokens: how many tokens of ``data`` to use at most.
        sequence_length: tokens of a window.
        progress: show a progress bar, or lines where stderr is no terminal.

    Raises:
        EndpointError: a name is not served, the teacher is not, or the server fails.
        GearshiftError: data, examples or table are missing or damaged.
    """
    check_appendable(out)
    served = endpoint.models()
    teacher = next((name for name, placement in served.items() if set(placement) == {FULL_ATTENTION}), None)
    asked = list(models or served)
    unknown = [name for name in asked if name not in served]
    if unknown or teacher is None:
        what = f"no model {unknown[0]!r}" if unknown else "no model with full attention in every layer"
        raise EndpointError(
            f"{endpoint.url} serves {what} with a known placement; it serves {', '.join(served) or 'none'}"
        )
    tokenizer = load_tokenizer(supernet)
    held_out = read_held_out(data, recall, tokenizer, tokens=tokens, sequence_length=sequence_length)
    origin = {"checkpoint": _served_checkpoint(supernet), "data": held_out.name}
    rows = select_rows(read_table(out), **origin)
    missing = {served[name]: name for name in [teacher, *asked] if served[name] not in rows}
    batches = len(held_out.windows) + len(held_out.examples)
    with show_progress("evaluate", len(missing) * batches, enabled=progress) as report:
        for number, (placement, name) in enumerate(missing.items()):

            def done(count: int, number: int = number, name: str = name) -> None:
                report(number * batches + count, name)

            row = _evaluate(endpoint, name, held_out, lambda ids: str(tokenizer.decode(ids)), done)
            teacher_loss = row["loss"] if placement == served[teacher] else rows[served[teacher]]["loss"]
            row["retention"] = math.exp(teacher_loss - row["loss"])
            rows[placement] = {**origin, "placement": str(placement), **row}
            append_row(out, rows[placement])
    return [rows[served[name]] for name in asked]


def _served_checkpoint(directory: Path) -> str:
    """What rows of a server are keyed by: engines compute in other precisions than evaluation here does."""
    return f"{checkpoint_digest(directory)} served"


def _evaluate(
    endpoint: Endpoint, model: str, held_out: HeldOut, decode: Decode, report: Callable[[int], None]
) -> Row:
    """A row's own columns, retention left out."""
    began, total, count = time.perf_counter(), 0.0, 0
    for done, window in enumerate(held_out.windows.tolist(), start=1):
        likelihoods = endpoint.log_likelihoods(model, window)
        total, count = total - sum(likelihoods), count + len(likelihoods)
        report(done)
    right: dict[str, list[bool]] = {}
    for done, example in enumerate(held_out.examples, start=len(held_out.windows) + 1):
        right.setdefault(example.task, []).append(_recalls(endpoint, model, example, decode))
        report(done)
    loss = total / count
    if not math.isfinite(loss):
        raise EndpointError(f"{endpoint.url} reports a loss of {loss} for {model!r}; its weights are broken")
    return {
        "loss": loss,
        "kl": None,
        "recall": {task: sum(hits) / len(hits) for task, hits in sorted(right.items())},
        "quality": math.exp(-loss),
        "tokens": count,
        "seconds": round(time.perf_counter() - began, 3),
        "provenance": provenance(),
    }


def _recalls(endpoint: Endpoint, model: str, example: EncodedExample, decode: Decode) -> bool:
    """Whether every token of the answer is the most likely one, given all tokens before it."""
    prompt, answer = example.tokens[: example.prompt_length], example.tokens[example.prompt_length :]
    return endpoint.answer(model, prompt, len(answer)) == decode(list(answer))

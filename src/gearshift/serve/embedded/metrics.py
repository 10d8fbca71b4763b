"""Counts of requests and tokens, in the text form that Prometheus reads."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

from gearshift.serve.embedded.engine import Load


class Metrics:
    """What was served so far, by preset; used from the server's event loop only."""

    def __init__(self) -> None:
        self._requests: Counter[tuple[str, str]] = Counter()
        self._prompt_tokens: Counter[str] = Counter()
        self._new_tokens: Counter[str] = Counter()

    def count(self, preset: str, outcome: str, prompt_tokens: int, new_tokens: int) -> None:
        """Add a request that came to its end.

        Args:
            preset: `gearshift.serve.catalog.Choice.label`.
            outcome: ``completed``, ``aborted`` or ``failed``.
            prompt_tokens: tokens of its prompts.
            new_tokens: tokens that were generated.
        """
        self._requests[preset, outcome] += 1
        self._prompt_tokens[preset] += prompt_tokens
        self._new_tokens[preset] += new_tokens

    def text(self, load: Load) -> str:
        """All of it, and what the engine has to do at the moment."""
        return "\n".join((*self._counters(), *_gauges(load), ""))

    def _counters(self) -> Iterator[str]:
        yield from _head("gearshift_requests_total", "counter", "Requests that came to their end.")
        for (preset, outcome), count in self._requests.items():
            yield f'gearshift_requests_total{{preset="{preset}",outcome="{outcome}"}} {count}'
        for name, what, counts in (
            ("gearshift_prompt_tokens_total", "Tokens of prompts.", self._prompt_tokens),
            ("gearshift_generation_tokens_total", "Tokens generated.", self._new_tokens),
        ):
            yield from _head(name, "counter", what)
            for preset, count in counts.items():
                yield f'{name}{{preset="{preset}"}} {count}'


def _gauges(load: Load) -> Iterator[str]:
    for name, what, value in (
        ("gearshift_sequences_running", "Sequences that take turns.", load.running),
        ("gearshift_sequences_waiting", "Sequences that wait for a place.", load.waiting),
    ):
        yield from _head(name, "gauge", what)
        yield f"{name} {value}"


def _head(name: str, kind: str, what: str) -> Iterator[str]:
    yield f"# HELP {name} {what}"
    yield f"# TYPE {name} {kind}"

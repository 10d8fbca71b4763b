"""Workload: what a user serves. Plain data, no torch."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from gearshift._checks import check_keys, is_count
from gearshift.errors import GearshiftError


class WorkloadError(GearshiftError, ValueError):
    """A workload's number makes no sense."""


@dataclass(frozen=True)
class Workload:
    """What is served, for which placements are compared.

    Attributes:
        context_length: tokens that a sequence holds while it decodes.
        prompt_tokens: tokens of a request's prompt; 0 where only decoding is looked at.
        output_tokens: tokens generated per request.
        concurrency: sequences decoded together; None means as many as fit in the memory.
        memory_bytes: memory for caches, in bytes; None means it does not limit.

    Raises:
        WorkloadError: a number is out of range, or prompt and output do not fit in the context.
    """

    context_length: int
    prompt_tokens: int = 0
    output_tokens: int = 1
    concurrency: int | None = None
    memory_bytes: int | None = None

    def __post_init__(self) -> None:
        least = {
            "context_length": 1,
            "prompt_tokens": 0,
            "output_tokens": 0,
            "concurrency": 1,
            "memory_bytes": 1,
        }
        for name, smallest in least.items():
            value = getattr(self, name)
            optional = name in ("concurrency", "memory_bytes")
            if not (value is None and optional) and not is_count(value, smallest):
                also = " or nothing" if optional else ""
                raise WorkloadError(f"{name} = {value!r}; expected a whole number, at least {smallest}{also}")
        if self.prompt_tokens + self.output_tokens > self.context_length:
            raise WorkloadError(
                f"{self.prompt_tokens} prompt and {self.output_tokens} output tokens exceed the "
                f"context_length of {self.context_length}; lengthen the context or shorten them"
            )

    @classmethod
    def from_json(cls, given: object) -> Workload:
        """Read the JSON form.

        Raises:
            WorkloadError: a key is missing or unknown, or a number is out of range.
        """
        return cls(**check_keys(cls, given, "the workload", WorkloadError))

    def to_json(self) -> dict[str, Any]:
        """The JSON form: every field by its name."""
        return asdict(self)

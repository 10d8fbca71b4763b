"""What a calibration is asked to do, checked before anything is read. No torch."""

from __future__ import annotations

from dataclasses import dataclass, fields

from gearshift._checks import is_count, is_number
from gearshift.errors import GearshiftError

DECAY, STEPS, RIDGE = "decay", "steps", "ridge"
PARTS = (DECAY, STEPS, RIDGE)


class CalibrationError(GearshiftError, ValueError):
    """A calibration cannot start, or cannot go on, with what was given."""


@dataclass(frozen=True)
class CalibrationSettings:
    """What decides the result, beside the supernet and the text.

    Attributes:
        tokens: how many tokens of the text to use at most, spread evenly over it.
        sequence_length: tokens that a mixer sees at a time.
        steps: optimiser steps of each mixer.
        batch_size: sequences in a step.
        learning_rate: after the warm-up; None for 1 / hidden size. A step moves every weight by about as
            much, and the wider a model, the more weights add up in each of its numbers.
        ridge: how strongly the output projection is held to what it was, in parts of the mean square of its
            inputs.
        seed: of the batches.
        parts: which of ``decay``, ``steps`` and ``ridge`` to do.

    Raises:
        CalibrationError: a value cannot be.
    """

    tokens: int = 200_000
    sequence_length: int = 512
    steps: int = 300
    batch_size: int = 2
    learning_rate: float | None = None
    ridge: float = 1e-3
    seed: int = 0
    parts: tuple[str, ...] = PARTS

    def __post_init__(self) -> None:
        for name, least in (
            ("tokens", 1),
            ("sequence_length", 2),
            ("steps", 1),
            ("batch_size", 1),
            ("seed", 0),
        ):
            value = getattr(self, name)
            if not is_count(value, least):
                raise CalibrationError(f"{name} is {value!r}; expected a whole number of at least {least}")
        for name in ("ridge",) if self.learning_rate is None else ("learning_rate", "ridge"):
            value = getattr(self, name)
            if not (is_number(value) and value > 0):
                raise CalibrationError(f"{name} is {value!r}; expected a positive number")
        if not self.parts or any(part not in PARTS or self.parts.count(part) > 1 for part in self.parts):
            given = ", ".join(map(str, self.parts)) or "none"
            raise CalibrationError(f"parts are {given}; expected some of {', '.join(PARTS)}, each once")
        object.__setattr__(self, "parts", tuple(part for part in PARTS if part in self.parts))

    def differences(self, other: CalibrationSettings) -> list[str]:
        """What differs from other settings, such as ``steps: was 200, now 300``; ``other`` is the new one."""
        names = [field.name for field in fields(self)]
        changed = [name for name in names if getattr(self, name) != getattr(other, name)]
        return [f"{name}: was {getattr(self, name)}, now {getattr(other, name)}" for name in changed]

"""What a surrogate predicts: a column of the evaluation rows, turned so that higher is better."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from gearshift._checks import is_number
from gearshift.errors import GearshiftError

_TEXT = re.compile(r"(?P<sign>-?)(?:(?P<function>log|sqrt)\((?P<inner>[\w.]+)\)|(?P<column>[\w.]+))")


class TargetError(GearshiftError, ValueError):
    """A target is malformed, or a row does not hold it."""


@dataclass(frozen=True)
class Target:
    """A monotone function of one column of the evaluation rows; higher is better.

    It is written ``quality``, ``-loss``, ``log(quality)``, ``-sqrt(kl)`` or ``recall.copy``: a minus where
    the column is better when lower, a function that makes the effects of single layers add up better, the
    column, and a dot for a key inside a column. Since the function is monotone it changes no ranking of
    placements.

    Attributes:
        column: name in the rows.
        sign: 1 or -1.
        function: "", "log" or "sqrt".
    """

    column: str
    sign: int = 1
    function: str = ""

    @classmethod
    def parse(cls, text: str) -> Target:
        """Read the text form.

        Raises:
            TargetError: it is malformed.
        """
        match = _TEXT.fullmatch(text.replace(" ", ""))
        if match is None:
            raise TargetError(
                f"the target {text!r}; expected a column such as 'quality', '-loss' or '-sqrt(kl)'"
            )
        column = match["column"] or match["inner"]
        return cls(column, -1 if match["sign"] else 1, match["function"] or "")

    def __str__(self) -> str:
        inner = f"{self.function}({self.column})" if self.function else self.column
        return f"-{inner}" if self.sign < 0 else inner

    def of_row(self, row: Mapping[str, Any]) -> float:
        """The target's value in an evaluation row.

        Raises:
            TargetError: the row lacks the column, or holds no number there that the function takes.
        """
        found: object = row
        for key in self.column.split("."):
            if not isinstance(found, Mapping) or key not in found:
                raise TargetError(f"no column {self.column!r}; the row has {sorted(row)}")
            found = found[key]
        if not is_number(found):
            raise TargetError(f"{self.column} = {found!r}; expected a finite number")
        try:
            return self.of_column(float(found))  # pyright: ignore[reportArgumentType] - is_number checked it
        except ValueError:
            raise TargetError(
                f"{self.column} = {found!r} has no {self.function}; choose another target"
            ) from None

    def of_column(self, value: float) -> float:
        """The target's value for a value of the column."""
        function = {"": float, "log": math.log, "sqrt": math.sqrt}[self.function]
        return self.sign * function(value)

    def to_column(self, value: float) -> float:
        """The column's value for a value of the target; a predicted root below 0 counts as 0."""
        inner = self.sign * value
        if self.function == "log":
            return math.exp(inner)
        return max(inner, 0.0) ** 2 if self.function == "sqrt" else inner

    def retention(self, value: float, teacher_value: float) -> float:
        """Quality over the teacher's quality, both given as values of the target.

        ``loss`` is the mean negative log-likelihood, and quality is exp(-loss), so its retention is the
        exponential of a difference; ``kl``, never negative, is the expected loss above the teacher's on the
        teacher's own text. For any other column it is the ratio.
        """
        mine, teachers = self.to_column(value), self.to_column(teacher_value)
        if self.column == "kl":
            return math.exp(-max(mine, 0.0))
        if self.column == "loss":
            return math.exp(teachers - mine)
        best, other = (mine, teachers) if self.sign > 0 else (teachers, mine)
        return best / other if other else math.nan

    def value_at(self, retention: float, teacher_value: float) -> float:
        """The target's value that has this retention: what `retention` undoes.

        Args:
            retention: above 0.
            teacher_value: the target's value of the teacher.
        """
        teachers = self.to_column(teacher_value)
        if self.column == "kl":
            return self.of_column(max(-math.log(retention), 0.0))
        if self.column == "loss":
            return self.of_column(teachers - math.log(retention))
        return self.of_column(teachers * retention if self.sign > 0 else teachers / retention)

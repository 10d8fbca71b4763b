"""A JSON object of a config, read value by value, with the place where it stands for messages."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any, NoReturn

from gearshift._checks import is_count, is_number
from gearshift.convert.teachers.base import ConversionError


@dataclass(frozen=True)
class Fields:
    """Some object of a ``config.json``; null counts as absent, but for :meth:`has`.

    Attributes:
        given: the object.
        where: its file, and the keys that lead to it.

    Raises:
        ConversionError: it is no object; and by every method, a value is absent without a default, or of a
            kind that cannot be.
    """

    given: dict[str, Any]
    where: str

    def __post_init__(self) -> None:
        if not isinstance(self.given, dict):
            raise ConversionError(f"{self.where} is {self.given!r:.80}; expected an object: restore it")

    def refuse(self, key: str, reason: str) -> NoReturn:
        """Raise the error that says what is wrong with a value."""
        raise ConversionError(f"{self.where}: {key} is {self.given.get(key)!r:.80}; {reason}")

    def has(self, key: str) -> bool:
        """Whether the key is there, if only with null."""
        return key in self.given

    def value(self, key: str, default: Any = None) -> Any:  # noqa: ANN401 - JSON is whatever the file holds
        """A value of any kind; without a default it must be there."""
        found = self.given.get(key)
        if found is not None:
            return found
        if default is None:
            raise ConversionError(f"{self.where} has no {key!r}; restore the file")
        return default

    def inner(self, key: str, optional: bool = False) -> Fields:
        """An object inside this one; an absent optional one is empty."""
        found = self.value(key, {}) if optional else self.value(key)
        return Fields(found, f"{self.where}.{key}")

    def count(self, key: str, default: int | None = None) -> int:
        """A positive whole number."""
        found = self.value(key, default)
        if not is_count(found, 1):
            self.refuse(key, "expected a positive whole number")
        return found

    def number(self, key: str, default: float | None = None) -> float:
        """A positive number."""
        found = self.value(key, default)
        if not is_number(found) or found <= 0:
            self.refuse(key, "expected a positive number")
        return float(found)

    def flag(self, key: str, default: bool) -> bool:
        """True or false."""
        found = self.value(key, default)
        if not isinstance(found, bool):
            self.refuse(key, "expected true or false")
        return found

    def optional_flag(self, key: str) -> bool | None:
        """True or false, or None where nothing is said."""
        return self.flag(key, False) if self.given.get(key) is not None else None

    def choice(self, key: str, known: Collection[str], default: str | None = None) -> str:
        """One of some texts."""
        found = self.value(key, default)
        if not isinstance(found, str) or found not in known:
            self.refuse(key, f"expected {' or '.join(map(repr, known))}")
        return found

"""Checks of plain data read from files, shared by the modules that read it."""

from __future__ import annotations

import math
from dataclasses import MISSING, fields
from typing import Any

from gearshift.errors import GearshiftError


def check_keys(kind: type, given: object, what: str, error: type[GearshiftError]) -> dict[str, Any]:
    """Return ``given`` if it is a JSON object with the fields of the dataclass ``kind`` and no others.

    Raises:
        GearshiftError: of the class ``error``, naming the missing or unknown key.
    """
    if not isinstance(given, dict):
        raise error(f"{what} is {given!r}; expected a JSON object")
    known = [field.name for field in fields(kind)]
    required = [
        field.name for field in fields(kind) if field.default is MISSING and field.default_factory is MISSING
    ]
    missing = [name for name in required if name not in given]
    unknown = [str(name) for name in given if name not in known]
    if missing:
        raise error(f"{what} has no key {missing[0]!r}; expected the keys {required}")
    if unknown:
        raise error(f"{what} has an unknown key {unknown[0]!r}; expected only {known}")
    return given


def is_number(value: object) -> bool:
    """Whether ``value`` is a finite int or float; booleans are not numbers here."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def is_count(value: object, least: int) -> bool:
    """Whether ``value`` is a whole number of at least ``least``; booleans are not numbers here."""
    return isinstance(value, int) and not isinstance(value, bool) and value >= least

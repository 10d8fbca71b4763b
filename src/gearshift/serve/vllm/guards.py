"""Fail at import, and say so, when a private interface of vLLM is not the one this plugin was written for."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from gearshift.errors import GearshiftError

WORKING_VERSIONS = "0.26.*"


class VllmVersionError(GearshiftError, ImportError):
    """The installed vLLM is not one that this plugin works with."""


def expect_signature(function: Callable[..., Any], *parameters: str) -> None:
    """Refuse a function that does not take these parameters, in this order, before any others.

    Raises:
        VllmVersionError: it takes others.
    """
    found = tuple(inspect.signature(function).parameters)
    if found[: len(parameters)] != parameters:
        _refuse(f"{function.__qualname__} takes ({', '.join(found)}); expected ({', '.join(parameters)})")


def expect_fields(data_class: type, *names: str) -> None:
    """Refuse a dataclass without one of these fields.

    Raises:
        VllmVersionError: one is missing.
    """
    found = {field.name for field in dataclasses.fields(data_class)}
    missing = [name for name in names if name not in found]
    if missing:
        _refuse(f"{data_class.__qualname__} has no {', '.join(missing)}")


def expect_attributes(owner: object, *names: str) -> None:
    """Refuse a class or module that lacks one of these.

    Raises:
        VllmVersionError: one is missing.
    """
    missing = [name for name in names if not hasattr(owner, name)]
    if missing:
        _refuse(f"{getattr(owner, '__qualname__', owner)} has no {', '.join(missing)}")


def _refuse(difference: str) -> None:
    try:
        installed = version("vllm")
    except PackageNotFoundError:
        installed = "of an unknown version"
    raise VllmVersionError(
        f"vllm {installed} does not fit this plugin: {difference}. "
        f"Versions that work: {WORKING_VERSIONS}; pip install 'vllm=={WORKING_VERSIONS}'"
    )

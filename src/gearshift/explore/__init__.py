"""Pictures of the frontier: one self-contained HTML page, and a PNG.

The pictures need the extra ``viz``, so that they are imported when first asked for.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

from gearshift.errors import GearshiftError

if TYPE_CHECKING:
    from collections.abc import Callable

    from gearshift.explore.page import write_frontier_page
    from gearshift.explore.png import write_frontier_png

__all__ = ["MissingExtraError", "write_frontier_page", "write_frontier_png"]

_MODULES = {"write_frontier_page": "gearshift.explore.page", "write_frontier_png": "gearshift.explore.png"}


class MissingExtraError(GearshiftError):
    """A library that draws is not installed."""


def __getattr__(name: str) -> Callable[..., object]:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        return getattr(import_module(_MODULES[name]), name)
    except ModuleNotFoundError as error:
        raise MissingExtraError(
            f"the pictures need {error.name}, which is not installed; run: pip install 'gearshift[viz]'"
        ) from None

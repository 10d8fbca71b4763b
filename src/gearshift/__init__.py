"""Gearshift: one checkpoint, many speeds.

Importing this package is light: the public names below are loaded when they are first used, and the model
classes join Transformers' Auto classes as soon as those are imported, before or after this package.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from gearshift._auto_classes import register_with_auto_classes

if TYPE_CHECKING:
    from gearshift.convert import convert_teacher as convert_teacher
    from gearshift.convert import export_placement as export_placement
    from gearshift.convert import thin_supernet as thin_supernet
    from gearshift.errors import GearshiftError as GearshiftError
    from gearshift.placement import Placement as Placement
    from gearshift.placement import PlacementSpace as PlacementSpace
    from gearshift.presets import Preset as Preset
    from gearshift.supernet import SupernetCache as SupernetCache
    from gearshift.supernet import SupernetConfig as SupernetConfig
    from gearshift.supernet import SupernetForCausalLM as SupernetForCausalLM
    from gearshift.supernet import load_supernet as load_supernet
    from gearshift.supernet import save_supernet as save_supernet
    from gearshift.workload import Workload as Workload

__version__ = "0.1.0"

_HOMES = {
    "GearshiftError": "gearshift.errors",
    "Placement": "gearshift.placement",
    "PlacementSpace": "gearshift.placement",
    "Preset": "gearshift.presets",
    "SupernetCache": "gearshift.supernet",
    "SupernetConfig": "gearshift.supernet",
    "SupernetForCausalLM": "gearshift.supernet",
    "Workload": "gearshift.workload",
    "convert_teacher": "gearshift.convert",
    "export_placement": "gearshift.convert",
    "load_supernet": "gearshift.supernet",
    "save_supernet": "gearshift.supernet",
    "thin_supernet": "gearshift.convert",
}
__all__ = ["__version__", *_HOMES]  # pyright: ignore[reportUnsupportedDunderAll]


def __getattr__(name: str) -> Any:  # noqa: ANN401 - whatever the name stands for
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)


register_with_auto_classes()

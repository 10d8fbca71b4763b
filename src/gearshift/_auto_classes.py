"""Makes ``import gearshift`` enough for Transformers' Auto classes, without importing Transformers.

``gearshift.supernet`` registers its classes when it is imported, but importing it here would load torch even
for ``gearshift --help``. So it waits until Transformers has loaded its Auto classes, and for the end
of the outermost import that did so: in the middle of one, modules that the supernet needs may be half-loaded.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Sequence
from importlib import import_module
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType

AUTO_CONFIG_MODULE = "transformers.models.auto.configuration_auto"


def register_with_auto_classes() -> None:
    """Register the supernet's classes now if the Auto classes are loaded, else as soon as they are."""
    if AUTO_CONFIG_MODULE in sys.modules:
        import_module("gearshift.supernet")
    else:
        sys.meta_path.insert(0, _TransformersWatch())


class _TransformersWatch(MetaPathFinder):
    """Lets Transformers' modules load as ever, and notices when the outermost of them is done."""

    def __init__(self) -> None:
        self._depth = 0
        self._finding: str | None = None

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname.partition(".")[0] != "transformers" or fullname == self._finding:
            return None
        self._finding = fullname
        try:
            spec = importlib.util.find_spec(fullname)
        finally:
            self._finding = None
        if spec is not None and spec.loader is not None:
            self._watch(spec.loader)
        return spec

    def _watch(self, loader: Loader) -> None:
        load = loader.exec_module

        def exec_module(module: ModuleType) -> None:
            self._depth += 1
            try:
                load(module)
            finally:
                self._depth -= 1
            self._register_if_done()

        # The loader stays the same object, for everything else that asks a module's loader something.
        vars(loader)["exec_module"] = exec_module

    def _register_if_done(self) -> None:
        if self._depth == 0 and AUTO_CONFIG_MODULE in sys.modules and self in sys.meta_path:
            sys.meta_path.remove(self)
            import_module("gearshift.supernet")

"""Sets Pyro's `module_local_params` as soon as Pyro is there, without importing it (and torch) for `calibrant --help`.

Pyro reads the setting when a `PyroModule` is built, so it has to be on before the user's first one.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType


def keep_parameters_in_modules() -> None:
    """Set it now where Pyro is imported already, else when it will be."""
    if "pyro" in sys.modules:
        sys.modules["pyro"].settings.set(module_local_params=True)
    else:
        sys.meta_path.insert(0, _PyroFinder())


class _PyroFinder(MetaPathFinder):
    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if name != "pyro":
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        if spec is not None and spec.loader is not None:
            spec.loader = _PyroLoader(spec.loader)
        return spec


class _PyroLoader(Loader):
    def __init__(self, loader: Loader) -> None:
        self.loader = loader

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self.loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        self.loader.exec_module(module)
        module.settings.set(module_local_params=True)

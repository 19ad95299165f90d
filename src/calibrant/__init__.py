"""Deep generative models written as Pyro programs, with amortized guides checked against the exact posterior."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from calibrant._version import __version__

if TYPE_CHECKING:
    from calibrant import (
        data,
        distributions,
        errors,
        evaluation,
        guides,
        inference,
        models,
        program,
        reproductions,
        store,
    )
    from calibrant.io_pyro import to_datatree
    from calibrant.pyro_models import from_pyro
    from calibrant.store import load, save

__all__ = [
    "__version__",
    "data",
    "distributions",
    "errors",
    "evaluation",
    "from_pyro",
    "guides",
    "inference",
    "load",
    "models",
    "program",
    "representations",
    "reproductions",
    "save",
    "store",
    "to_datatree",
]

_FUNCTIONS = {
    "from_pyro": "calibrant.pyro_models",
    "load": "calibrant.store",
    "save": "calibrant.store",
    "to_datatree": "calibrant.io_pyro",
}  # name → the module that it is imported from


def __getattr__(name: str) -> Any:
    """Import submodules when they are first used, so that `calibrant --help` needs no torch."""
    if name in _FUNCTIONS:
        return getattr(importlib.import_module(_FUNCTIONS[name]), name)
    if name in __all__:
        return importlib.import_module(f"calibrant.{name}")
    raise AttributeError(f"module 'calibrant' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)

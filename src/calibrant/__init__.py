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
    from calibrant.store import load

__all__ = [
    "__version__",
    "data",
    "distributions",
    "errors",
    "evaluation",
    "guides",
    "inference",
    "load",
    "models",
    "program",
    "representations",
    "reproductions",
    "store",
]


def __getattr__(name: str) -> Any:
    """Import submodules when they are first used, so that `calibrant --help` needs no torch."""
    if name == "load":
        return importlib.import_module("calibrant.store").load
    if name in __all__:
        return importlib.import_module(f"calibrant.{name}")
    raise AttributeError(f"module 'calibrant' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)

"""Guides: amortized ones (an encoder, a family for each latent, a structure), and the model's own prior."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from calibrant.calls import own_call, own_calls
from calibrant.guides.adapters import EncoderGuide, from_encoder, wrap
from calibrant.guides.amortized import AmortizedGuide
from calibrant.guides.amortizing import amortize, from_spec
from calibrant.guides.collapsed import CollapsedGuide
from calibrant.guides.families.choosing import FAMILIES
from calibrant.guides.from_prior import PriorGuide, prior
from calibrant.guides.refined import RefinedGuide

if TYPE_CHECKING:
    from calibrant.inference.refining import refine

__all__ = [
    "FAMILIES",
    "AmortizedGuide",
    "CollapsedGuide",
    "EncoderGuide",
    "PriorGuide",
    "RefinedGuide",
    "amortize",
    "from_encoder",
    "from_spec",
    "prior",
    "refine",
    "wrap",
]

globals().update(own_calls(__name__, globals(), __all__))


def __getattr__(name: str) -> Any:
    """Import `refine` on first use: it is built on inference, which is built on guides."""
    if name == "refine":
        globals()[name] = own_call(importlib.import_module("calibrant.inference.refining").refine, __name__)
        return globals()[name]
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)

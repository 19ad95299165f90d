"""Amortized guides: an encoder, families by support, and a structure."""

from calibrant.guides.amortize import AmortizedGuide, amortize, from_spec
from calibrant.guides.collapsed import CollapsedGuide
from calibrant.guides.families import FAMILIES
from calibrant.guides.own import EncoderGuide, from_encoder, wrap
from calibrant.guides.refine import RefinedGuide, refine

__all__ = [
    "FAMILIES",
    "AmortizedGuide",
    "CollapsedGuide",
    "EncoderGuide",
    "RefinedGuide",
    "amortize",
    "from_encoder",
    "from_spec",
    "refine",
    "wrap",
]

"""Amortized guides: an encoder, families by support, and a structure."""

from calibrant.guides.amortize import AmortizedGuide, amortize, from_spec
from calibrant.guides.collapsed import CollapsedGuide
from calibrant.guides.families import FAMILIES

__all__ = ["FAMILIES", "AmortizedGuide", "CollapsedGuide", "amortize", "from_spec"]

"""Whether what a user gives is a number."""

from __future__ import annotations

from math import isfinite
from numbers import Integral, Real


def is_whole(value: object) -> bool:
    """Whether a value is a whole number, of Python or numpy."""
    return isinstance(value, Integral) and not isinstance(value, bool)


def is_real(value: object) -> bool:
    """Whether a value is a finite real number, of Python or numpy."""
    return not isinstance(value, bool) and isinstance(value, Real) and isfinite(value)

"""Settings of evaluations, whole numbers and shares, checked."""

from __future__ import annotations

import operator
from typing import Any

import numpy as np

from calibrant.errors import DataError, InferenceError
from calibrant.evaluation.statistics.arrays import plain


def whole(value: Any, name: str, least: int) -> int:
    """A whole number of at least `least`.

    Raises:
        InferenceError: for anything else, also floats such as 2.0 and truth values.
    """
    try:
        found = operator.index(value)
    except TypeError:
        found = least - 1
    if found < least or isinstance(value, bool | np.bool_):
        raise InferenceError(f"{name}={value!r}: give a whole number of {least} or more")
    return found


def real(value: Any, name: str) -> float:
    """A number, which may be infinite or NaN.

    Raises:
        InferenceError: for anything else.
    """
    try:
        return float(value + 0)  # texts of numbers have no sum with 0
    except (TypeError, ValueError, RuntimeError):
        raise InferenceError(f"{name}={value!r}: give a number") from None


def wholes(values: Any, name: str, least: int) -> list[int]:
    """One or more whole numbers of at least `least`.

    Raises:
        InferenceError: for anything else.
    """
    try:
        found = plain(values)
    except DataError:
        found = np.empty(0)
    if found.ndim != 1 or not len(found) or found.dtype.kind not in "iu" or found.min() < least:
        raise InferenceError(f"{name}={values!r}: give a list of whole numbers of {least} or more, such as [{least}]")
    return [int(value) for value in found]


def shares(values: Any, name: str) -> list[float]:
    """One or more numbers above 0 and below 1.

    Raises:
        InferenceError: for anything else.
    """
    try:
        found = plain(values)
    except DataError:
        found = np.empty(0)
    if found.ndim != 1 or not len(found) or found.dtype.kind != "f" or not ((found > 0) & (found < 1)).all():
        raise InferenceError(f"{name}={values!r}: give a list of numbers between 0 and 1, such as [0.9]")
    return [float(value) for value in found]

"""Results that a figure draws, by name, checked."""

from __future__ import annotations

from collections.abc import Mapping

import xarray as xr

from calibrant.errors import InferenceError


def checked_results(results: object, made_by: str, needed: tuple[str, ...]) -> None:
    """Refuse what is no mapping from names to results of a function.

    Args:
        results: what a user gives.
        made_by: name of the function.
        needed: variables and coordinates that its results have.

    Raises:
        InferenceError: for anything else, also for a result without a name, or none.
    """
    if isinstance(results, xr.Dataset) or not isinstance(results, Mapping):
        raise InferenceError(f"{type(results).__name__}: give a dictionary, {{name: result of {made_by}}}")
    if not results:
        raise InferenceError(f"there is nothing to draw: give {{name: result of {made_by}}}")
    for name, result in results.items():
        if not isinstance(result, xr.Dataset) or any(part not in result.variables for part in needed):
            raise InferenceError(f"{name!r} is no result of {made_by}: give {{name: result of {made_by}}}")

"""Sets of images, the model's own and others, and where they stand in a result."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from calibrant.binding import bind
from calibrant.data.dataset import Data
from calibrant.errors import DataError, InferenceError
from calibrant.inference.problem import Problem

INSIDE = "inside"

Sets = Mapping[str, Any]


def named(outside: Sets) -> dict[str, Any]:
    """The other sets by name.

    Raises:
        InferenceError: for no sets, or one with the name of the model's own.
    """
    if not isinstance(outside, Mapping):
        raise InferenceError(f"outside is a {type(outside).__name__}: give a dict such as {{'noise': images}}")
    if not outside or INSIDE in outside:
        raise InferenceError(f"outside holds the sets {list(outside)}: give one or more, none of them named {INSIDE!r}")
    return {str(name): images for name, images in outside.items()}


def checked_sets(problem: Problem, sets: Sets) -> dict[str, Data]:
    """Sets of images as data of the program.

    Args:
        problem: the program, with images of its own.
        sets: name → images `(image, *event)`, or a dict or a `Data` with the names of the program's sites.

    Raises:
        DataError: for images that the program can't take, naming their set.
    """
    observed, found = problem.data.observed_names[0], {}
    for name, images in sets.items():
        given = images if isinstance(images, Data | Mapping) else {observed: images}
        try:
            data = bind(problem.program, given)
            if data.observed_names != (observed,):
                raise DataError(f"it holds the observations {list(data.observed_names)}, wanted {observed!r} alone")
            wanted, has = (tuple(part.batch([0])[0][observed].shape[1:]) for part in (problem.data, data))
            if wanted != has:
                raise DataError(f"{observed!r} has images of shape {has}, wanted {wanted}: resize them first")
            found[name] = problem.of_others(data).data
        except DataError as error:
            raise DataError(f"set {name!r}: {error}") from error
    return found


def set_coords(sets: Mapping[str, Data]) -> dict[str, tuple[str, Any]]:
    """Coordinates of images of several sets, one after the other: their set, and their label in it."""
    of_set = np.array([name for name, data in sets.items() for _ in range(len(data))])
    labels = np.concatenate([data.labels().astype(str) for data in sets.values()])
    return {"of_set": ("image", of_set), "label": ("image", labels)}

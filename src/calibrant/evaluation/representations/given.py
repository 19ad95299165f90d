"""Embeddings, classes and uncertainties of the same images as arrays, checked once for several experiments."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from calibrant.errors import DataError
from calibrant.evaluation.representations.inputs import Labels, class_numbers, image_numbers, matrix_of
from calibrant.evaluation.statistics.arrays import Array, Given
from calibrant.evaluation.statistics.resampling import Groups


class Images(NamedTuple):
    """Images as experiments see them.

    Attributes:
        embeddings: in the dtype in which they were given, `(image, feature)`.
        classes: whole numbers from 0, `(image,)`.
        uncertainty: larger for less certain images, `(image,)`.
    """

    embeddings: np.ndarray
    classes: Groups
    uncertainty: Array

    @classmethod
    def of(cls, embeddings: Given, labels: Labels, uncertainty: Given, finite: bool = True) -> Images:
        """Images from what a user gives; unless `finite`, NaN in embeddings are let through.

        Raises:
            DataError: for arrays that do not belong together or hold NaN.
        """
        matrix = (finite_matrix if finite else matrix_of)(embeddings, "embeddings")
        size = len(matrix)
        return cls(matrix, class_numbers(labels, size), image_numbers(uncertainty, size, "uncertainty"))

    def some(self, index: Groups) -> Images:
        return Images(self.embeddings[index], self.classes[index], self.uncertainty[index])


def finite_matrix(values: Given, name: str) -> np.ndarray:
    """Finite numbers `(image, feature)`, in the dtype in which they are given."""
    matrix = matrix_of(values, name)
    if not np.isfinite(matrix).all():
        raise DataError(f"{name}: some of the numbers are not finite; remove those images")
    return matrix


def two_matrices(first: Given, second: Given, names: tuple[str, str]) -> tuple[np.ndarray, np.ndarray]:
    """Two sets of images with the same features, as `finite_matrix`."""
    one, other = (finite_matrix(values, name) for values, name in zip((first, second), names, strict=True))
    if one.shape[1] != other.shape[1]:
        raise DataError(
            f"{names[0]} has {one.shape[1]} features and {names[1]} {other.shape[1]}: give both from one representation"
        )
    return one, other


def unit_rows(rows: np.ndarray, name: str) -> np.ndarray:
    """Rows of length 1, in float64 or float32.

    Raises:
        DataError: for rows of zeros.
    """
    rows = rows.astype(np.promote_types(rows.dtype, np.float32))
    lengths = np.linalg.norm(rows, axis=1, keepdims=True)
    if (lengths == 0).any():
        raise DataError(f"{name}: {int((lengths == 0).sum())} of them are zero and have no direction; remove them")
    return np.asarray(rows / lengths)

"""What the evaluations of representations take: embeddings, labels and uncertainties of the same images, checked."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt
from torch import Tensor

from calibrant.errors import DataError, InferenceError
from calibrant.evaluation.statistics.arrays import Array, Given, numbers, plain
from calibrant.evaluation.statistics.resampling import Groups

Cluster = Literal["image", "class"]
Labels = npt.ArrayLike | Tensor

_MOST_ZEROS = 0.9  # share of embeddings that may be zero after NaN are replaced, as in published code


@dataclass(frozen=True)
class Embedded:
    """What a representation says about the images of one set.

    Attributes:
        embeddings: `(image, feature)`.
        labels: classes `(image,)`, whole numbers or names.
        uncertainty: `(image,)`, larger where the representation is less certain.
    """

    embeddings: Given
    labels: Labels
    uncertainty: Given


def refuse_unless_embedded(given: object) -> None:
    """Check what is given for `Embedded`.

    Raises:
        DataError: for what has not the three parts of `Embedded`.
    """
    if not all(hasattr(given, part) for part in ("embeddings", "labels", "uncertainty")):
        raise DataError(
            f"{type(given).__name__}: give cal.evaluation.Embedded(embeddings, labels, uncertainty) of each"
        )


def matrix_of(embeddings: Given, name: str = "embeddings") -> np.ndarray:
    """Embeddings `(image, feature)` as they are, without a copy where that is possible; NaN are let through.

    Raises:
        DataError: for anything but a matrix of floats with a row and a column or more.
    """
    matrix = plain(embeddings, name)
    if matrix.ndim != 2 or not matrix.size or not np.issubdtype(matrix.dtype, np.floating):
        raise DataError(f"{name}: {matrix.dtype} of shape {matrix.shape}; give embeddings (image, feature) of floats")
    return matrix


def class_numbers(labels: Labels, size: int, name: str = "labels") -> Groups:
    """Classes as whole numbers from 0, `(image,)`.

    Raises:
        DataError: for another number of labels than images, or labels that are neither whole numbers nor names.
    """
    return np.unique(class_labels(labels, size, name), return_inverse=True)[1].reshape(-1)


def class_labels(labels: Labels, size: int, name: str = "labels") -> np.ndarray:
    """Labels as they are given, `(image,)`, whole numbers or names.

    Raises:
        DataError: as `class_numbers`.
    """
    values = plain(labels, name)
    if values.shape != (size,):
        raise DataError(f"{name} have the shape {values.shape}: give one for each of the {size} images")
    if values.dtype.kind == "f" and np.isnan(values).any():
        raise DataError(f"{name} hold NaN: remove images without a class")
    if values.dtype.kind == "O" and all(isinstance(value, str) for value in values):
        return values.astype(str)
    if values.dtype.kind not in "biuUSf" or (values.dtype.kind == "f" and not (values % 1 == 0).all()):
        raise DataError(f"{name}: some are neither whole numbers nor names; give the class of each image")
    return values


def joint_classes(
    labels: tuple[Labels, Labels], sizes: tuple[int, int], names: tuple[str, str]
) -> tuple[Groups, Groups]:
    """Classes of queries and of a database as the same whole numbers.

    Raises:
        DataError: as `class_numbers`, or for names on one side and numbers on the other.
    """
    one, other = (class_labels(*part) for part in zip(labels, sizes, names, strict=True))
    if (one.dtype.kind in "US") != (other.dtype.kind in "US"):
        raise DataError(f"{names[0]} and {names[1]}: one holds names and the other numbers; give the same classes")
    joined = class_numbers(np.concatenate([one, other]), sum(sizes))
    return joined[: sizes[0]], joined[sizes[0] :]


def positions(given: npt.ArrayLike | None, queries: int, stored: int, name: str, least: int = -1) -> Groups:
    """Positions in a database, −1 for none, `(query,)`; without any, −1 for all.

    Raises:
        InferenceError: for anything but one whole number in range for each query.
    """
    if given is None:
        return np.full(queries, -1)
    places = plain(given, name)
    if places.shape != (queries,) or places.dtype.kind not in "iu" or places.min() < least or places.max() >= stored:
        start = str(least).replace("-", "−")
        raise InferenceError(f"{name}: give a position from {start} to {stored - 1} for each of the {queries} queries")
    return places.astype(np.int64)


def image_numbers(values: Given, size: int, name: str) -> Array:
    """One number for each image, in float64; infinite numbers are allowed.

    Raises:
        DataError: for another shape, or NaN.
    """
    found = numbers(values, name)
    if found.shape != (size,):
        raise DataError(f"{name} has the shape {found.shape}: give one number for each of the {size} images")
    if np.isnan(found).any():
        raise DataError(f"{name} is NaN for {int(np.isnan(found).sum())} of {size} images: remove them everywhere")
    return found


def units_of(cluster: str, classes: Groups | None, size: int) -> Groups:
    """The unit that each image is resampled with: itself, or its class.

    Raises:
        InferenceError: for another cluster, or "class" without labels.
    """
    if cluster == "image":
        return np.arange(size)
    if cluster != "class":
        raise InferenceError(f"cluster={cluster!r}: give 'image' or 'class', which are resampled as a whole")
    if classes is None:
        raise InferenceError("cluster='class' needs the class of each image: give labels, or take cluster='image'")
    return classes


def without_nan(embeddings: np.ndarray, nan: str) -> np.ndarray:
    """Embeddings with zeros in place of NaN, if that is asked for, as in the code of URL (arXiv 2307.03810).

    Args:
        embeddings: `(image, feature)`.
        nan: "refuse" returns them as they are, and the search for neighbours refuses NaN; "zero" replaces it.

    Raises:
        DataError: if more than 90% of all entries are zero then.
    """
    if nan not in ("refuse", "zero"):
        raise InferenceError(f"nan={nan!r}: give 'refuse', or 'zero' to replace NaN in embeddings by 0")
    if nan == "refuse" or not np.isnan(embeddings).any():
        return embeddings
    found = np.nan_to_num(embeddings, nan=0.0, posinf=np.inf, neginf=-np.inf)
    if (share := float((found == 0).mean())) > _MOST_ZEROS:
        raise DataError(f"{share:.0%} of the embeddings' entries are zero with NaN set to 0: the representation failed")
    return found

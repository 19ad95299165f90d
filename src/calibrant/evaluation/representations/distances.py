"""Distance in feature space: how far images lie from those of the training, as an epistemic uncertainty."""

from __future__ import annotations

from typing import Literal

import numpy as np
import numpy.typing as npt

from calibrant.errors import InferenceError
from calibrant.evaluation.representations.given import two_matrices
from calibrant.evaluation.representations.inputs import Labels, class_numbers
from calibrant.evaluation.representations.neighbours import nearest_neighbours
from calibrant.evaluation.statistics.arrays import Array, Given
from calibrant.evaluation.statistics.resampling import Groups
from calibrant.progress import Progress, reporting

Distance = Literal["neighbour", "mahalanobis"]


def feature_distance(
    features: Given,
    training: Given,
    *,
    method: Distance = "neighbour",
    k: int = 10,
    labels: Labels | None = None,
    own: npt.ArrayLike | None = None,
    progress: Progress | bool = True,
) -> Array:
    """How far images lie from training images in the space of their features: a scalar for epistemic uncertainty.

    Args:
        features: `(image, feature)`.
        training: features of the training images, `(n, feature)`.
        method: "neighbour": 1 − cosine of the k-th nearest training image (Sun et al. 2022, arXiv 2204.06507);
            "mahalanobis": the least distance to a class mean in units of the covariance that all classes share (Lee et
            al. 2018, arXiv 1807.03888), which is shrunk (Ledoit & Wolf 2004) so that it can be inverted.
        k: the neighbour's number, for "neighbour".
        labels: classes of the training images, `(n,)`, for "mahalanobis".
        own: for "neighbour", position of each image among the training images, −1 for those that are not there; an
            image is not its own neighbour.
        progress: whether bars are shown in a terminal or notebook, or a function (stage, done, total, text).

    Returns:
        Distances `(image,)`: 1 − cosine between 0 and 2, or standard deviations.

    Raises:
        DataError: for features or labels that cannot be used.
        InferenceError: for an unknown method, labels that are missing, or classes without two different images.
    """
    progress = reporting(progress)
    if method == "neighbour":
        found = nearest_neighbours(features, training, k, own=own, progress=progress)
        return 1 - found.similarity[:, k - 1]
    if method != "mahalanobis":
        raise InferenceError(f'method={method!r}: give "neighbour" or "mahalanobis"')
    if labels is None:
        raise InferenceError('method="mahalanobis" needs labels=, the classes of the training images')
    there, base = (rows.astype(np.float64) for rows in two_matrices(features, training, ("features", "training")))
    return _mahalanobis(there, base, class_numbers(labels, len(base)))


def _mahalanobis(features: Array, training: Array, classes: Groups) -> Array:
    from sklearn.covariance import ledoit_wolf

    means = np.stack([training[classes == one].mean(0) for one in range(classes.max() + 1)])
    if not (training - means[classes]).any():
        raise InferenceError('method="mahalanobis": no class has two different images; give more of each class')
    covariance = ledoit_wolf(training - means[classes], assume_centered=True)[0]
    factor = np.linalg.cholesky(covariance)
    ours, centres = (np.linalg.solve(factor, rows.T).T for rows in (features, means))
    least = np.full(len(ours), np.inf)
    for centre in centres:
        least = np.minimum(least, ((ours - centre) ** 2).sum(1))
    return np.sqrt(least)

"""Two representations of the same images, compared query by query."""

from __future__ import annotations

import numpy as np
import xarray as xr

from calibrant.errors import DataError
from calibrant.evaluation.representations.inputs import (
    Cluster,
    Embedded,
    class_numbers,
    image_numbers,
    matrix_of,
    refuse_unless_embedded,
)
from calibrant.evaluation.representations.recall import judged_queries
from calibrant.evaluation.statistics.arrays import Array
from calibrant.evaluation.statistics.resampling import Statistic, bootstrap


def retrieval_difference(
    first: Embedded, second: Embedded, *, cluster: Cluster = "class", resamples: int = 1000, seed: int = 0
) -> xr.Dataset:
    """Differences of R@1 and R-AUROC of two representations of the same images, first minus second.

    Both are resampled together, so that images which are hard for both do not widen the interval. A difference of
    R-AUROCs where R@1 differs too is one of two questions, and not of two answers to one.

    Args:
        first: what one representation says about the images.
        second: what the other one says about the same images, in the same order.
        cluster: what the bootstrap resamples: each "class" with all its images, or each "image"; see `retrieval`.
        resamples: number of bootstrap resamples.
        seed: random seed for the bootstrap.

    Returns:
        `r_at_1` and `r_auroc`, with `…_se`, and `…_low` and `…_high`, the ends of the 95% interval.

    Raises:
        DataError: for other images or labels, or arrays that hold NaN.
        InferenceError: for settings that cannot be used.
    """
    for given in (first, second):
        refuse_unless_embedded(given)
    sizes = [len(matrix_of(one.embeddings)) for one in (first, second)]
    labels = [class_numbers(one.labels, size) for one, size in zip((first, second), sizes, strict=True)]
    if sizes[0] != sizes[1] or not np.array_equal(labels[0], labels[1]):
        raise DataError("the labels of the two differ: give the same images in the same order")
    one, other = (judged_queries(images.embeddings, images.labels, cluster=cluster) for images in (first, second))
    uncertainty = [image_numbers(images.uncertainty, sizes[0], "uncertainty") for images in (first, second)]
    of_recall = _difference(one.recall((1,)), other.recall((1,)))
    of_auroc = _difference(one.r_auroc(uncertainty[0]), other.r_auroc(uncertainty[1]))
    found = bootstrap(of_recall, [one.units], resamples, seed).part(0).variables("r_at_1")
    found |= bootstrap(of_auroc, [one.units], resamples, seed).variables("r_auroc")
    return xr.Dataset(found, attrs={"images": sizes[0], "cluster": cluster, "resamples": resamples, "seed": seed})


def _difference(first: Statistic, second: Statistic) -> Statistic:
    def difference(counts: Array) -> Array:
        return first(counts) - second(counts)

    return difference

"""Error versus reject: what is left of an error if the least certain images are rejected."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
import xarray as xr

from calibrant.errors import DataError, InferenceError
from calibrant.evaluation.representations.inputs import Cluster, Labels, class_numbers, image_numbers, units_of
from calibrant.evaluation.statistics.arrays import Array, Given, numbers, plain
from calibrant.evaluation.statistics.counted import counted_mean, runs_of
from calibrant.evaluation.statistics.resampling import Statistic, bootstrap

SHARES = tuple(float(share) for share in np.linspace(0.0, 0.95, 20).round(2))


def reject_curve(
    errors: Given,
    uncertainty: Given,
    labels: Labels | None = None,
    *,
    shares: npt.ArrayLike = SHARES,
    cluster: Cluster = "image",
    resamples: int = 1000,
    seed: int = 0,
) -> xr.Dataset:
    """Mean error of the images that are kept if the least certain ones are rejected, with its area.

    The area is the mean of that error over all numbers of kept images, from one to all. The oracle rejects by the
    errors themselves; a random order has the mean error of all images everywhere, and so has its area. Images of the
    same uncertainty are rejected in random order, of which the curve is the mean.

    Args:
        errors: error of each image, `(image,)`: 0 and 1, such as `~retrieval(…)["correct"]`, or any loss.
        uncertainty: larger where the representation is less certain, `(image,)`.
        labels: classes `(image,)`, for `cluster="class"`.
        shares: shares of images that are rejected, from 0 to below 1.
        cluster: what the bootstrap resamples: each "image" alone, or each "class" with all its images.
        resamples: number of bootstrap resamples.
        seed: random seed for the bootstrap.

    Returns:
        Over `rejected`, the share: `error` and `oracle`, the error of the kept images. `area`, `area_oracle`, and
        `area_random`, which is the mean error. `normalised_area`, (random − area) / (random − oracle): 1 for the order
        of the oracle, 0 for a random one, negative for a reversed one, NaN if all errors are equal. Each with `…_se`,
        `…_low` and `…_high`, the ends of the 95% interval.

    Raises:
        DataError: for arrays that do not belong together, hold NaN, or errors that are infinite.
        InferenceError: for settings that cannot be used.
    """
    values = numbers(errors, "errors").reshape(-1)
    if not len(values) or not np.isfinite(values).all():
        raise DataError("errors: give a finite error for at least one image")
    scores = image_numbers(uncertainty, len(values), "uncertainty")
    grid = np.atleast_1d(numbers(plain(shares, "shares"), "shares"))
    if grid.ndim != 1 or not len(grid) or not ((grid >= 0) & (grid < 1)).all():
        raise InferenceError("shares: give shares of rejected images from 0 to below 1")
    units = units_of(cluster, None if labels is None else class_numbers(labels, len(values)), len(values))
    found = bootstrap(_areas(values, scores), [units], resamples, seed)
    variables: dict[str, Any] = {}
    for place, name in enumerate(("area", "area_oracle", "area_random", "normalised_area")):
        variables |= found.part(place).variables(name)
    for name, by in (("error", scores), ("oracle", values)):
        estimate = bootstrap(kept_error(values, by, grid), [units], resamples, seed)
        variables |= estimate.variables(name, ("rejected",))
    attrs = {"images": len(values), "cluster": cluster, "resamples": resamples, "seed": seed}
    return xr.Dataset(variables, {"rejected": grid}, attrs)


def _areas(errors: Array, uncertainty: Array) -> Statistic:
    """Area, the oracle's, the random one's, and the normalised area, `(resample, 4)`."""
    ours, oracle, random = area_of_order(errors, uncertainty), area_of_order(errors, errors), counted_mean(errors)
    constant = np.ptp(errors) == 0

    def areas(counts: Array) -> Array:
        area, least, mean = ours(counts), oracle(counts), random(counts)
        with np.errstate(invalid="ignore", divide="ignore"):
            share = np.where((mean > least) & (not constant), (mean - area) / (mean - least), np.nan)
        return np.stack([area, least, mean, share], 1)

    return areas


def area_of_order(errors: Array, by: Array) -> Statistic:
    """Mean over all numbers m of kept images of the mean error of the m first.

    Among images that are tied, m − W of which are kept after W others with the total error E, the mean error is
    e + (E − W e) / m, where e is the mean of the tied images; its sum over m is a difference of harmonic numbers.
    """
    runs = _runs(errors, by)

    def area(counts: Array) -> Array:
        weights, totals = runs(counts)
        ends, sums = weights.cumsum(1), totals.cumsum(1)
        most = int(ends.max().round())
        harmonic = np.concatenate([[0.0], np.cumsum(1 / np.arange(1, most + 1))])
        places = ends.round().astype(np.int64)
        steps = np.diff(harmonic[places], axis=1, prepend=0.0)
        mean = np.divide(totals, weights, out=np.zeros_like(totals), where=weights > 0)
        whole = totals + ((sums - totals) - (ends - weights) * mean) * steps
        return whole.sum(1) / ends[:, -1]

    return area


def kept_error(errors: Array, by: Array, shares: Array) -> Statistic:
    """Mean error of the images that are kept at each share of rejected ones, `(resample, share)`."""
    runs = _runs(errors, by)

    def kept(counts: Array) -> Array:
        weights, totals = runs(counts)
        ends = np.concatenate([np.zeros((len(counts), 1)), weights.cumsum(1)], 1)
        sums = np.concatenate([np.zeros((len(counts), 1)), totals.cumsum(1)], 1)
        sizes = ends[:, -1:] * (1 - shares)
        whole = [np.interp(size, end, total) for size, end, total in zip(sizes, ends, sums, strict=True)]
        return np.array(whole) / sizes

    return kept


def _runs(errors: Array, by: Array) -> Callable[[Array], tuple[Array, Array]]:
    """Numbers of images with equal `by`, the smallest first, and their total errors, `(resample, run)` each."""
    found = runs_of(by)
    return lambda counts: (found.sums(counts), found.sums(counts * errors))

"""Bootstrap intervals of statistics of images, resampled one by one or in clusters.

A resample is a row of counts: how often it holds each image. Statistics are functions of such counts, so that scores
are sorted once for all resamples. The interval is the expanded percentile interval (Hesterberg 2015, Am. Stat. 69:371):
its percentiles lie further out than 2.5% and 97.5%, so that a mean of few units has the interval of Student's t.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from scipy.special import ndtr
from scipy.stats import t as student

from calibrant.errors import InferenceError
from calibrant.evaluation.statistics.arrays import Array
from calibrant.evaluation.statistics.separation import LEVEL
from calibrant.evaluation.statistics.settings import whole
from calibrant.streams import stream

_BLOCK = 1 << 22  # counts that are held at a time

Groups = npt.NDArray[np.int64]
Statistic = Callable[[Array], Array]
"""From counts `(resample, image)` to values `(resample, …)`; NaN where a resample does not have the statistic."""


class Estimate(NamedTuple):
    """A statistic of all images, its standard error, and the ends of its 95% interval, arrays of one shape."""

    value: Array
    se: Array
    low: Array
    high: Array

    def part(self, place: int) -> Estimate:
        """One of the statistics that were computed together, the last dimension of each array."""
        return Estimate(*(array[..., place] for array in self))

    def variables(self, name: str, dims: Sequence[str] = ()) -> dict[str, tuple[tuple[str, ...], Any]]:
        """Variables of a Dataset: `name`, `name_se`, `name_low` and `name_high`."""
        ends = ("", "_se", "_low", "_high")
        return {f"{name}{end}": (tuple(dims), part) for end, part in zip(ends, self, strict=True)}


def bootstrap(statistic: Statistic, units: Sequence[Groups], resamples: int, seed: int) -> Estimate:
    """The statistic of all images with its bootstrap interval.

    Args:
        statistic: from counts to values; images of several sets lie one set after the other.
        units: for each set that is resampled on its own, the unit of every image, integers from 0: an image's own
            number, or that of its cluster, which is resampled as a whole.
        resamples: number of resamples.
        seed: random seed for the resamples.

    Returns:
        The estimate. Resamples in which the statistic is not defined are left out. The interval is NaN if a set has
        one unit only.

    Raises:
        InferenceError: for fewer than 100 resamples, or a seed that is no whole number.
    """
    if whole(resamples, "resamples", 1) < 100:
        raise InferenceError(f"resamples={resamples}: the ends of a 95% interval need at least 100, better 1,000")
    whole(seed, "seed", 0)
    generator = np.random.default_rng(stream(seed, "bootstrap"))
    size = sum(len(of) for of in units)
    value = statistic(np.ones((1, size)))[0]
    least = min(int(of.max(initial=-1)) + 1 for of in units)
    if least < 2:
        unknown = np.full_like(value, np.nan)
        return Estimate(value, unknown, unknown, unknown)
    rows = max(1, _BLOCK // size)
    blocks = [min(rows, resamples - first) for first in range(0, resamples, rows)]
    found = np.concatenate([statistic(_counts(units, block, generator)) for block in blocks])
    with np.errstate(invalid="ignore"):
        any_there = np.isfinite(found).any(0)
        there = np.where(any_there, found, 0.0)
        low, high = np.nanquantile(there, [_tail(least), 1 - _tail(least)], axis=0)
        known = any_there & np.isfinite(value)
    ends = (np.nanstd(there, axis=0, ddof=1) * np.sqrt(least / (least - 1)), low, high)
    return Estimate(value, *(np.where(known, end, np.nan) for end in ends))


def _counts(units: Sequence[Groups], rows: int, generator: np.random.Generator) -> Array:
    """How often each image is in each of some resamples, `(resample, image)`."""
    parts = []
    for of in units:
        count = int(of.max()) + 1
        drawn = generator.integers(0, count, size=(rows, count)) + count * np.arange(rows)[:, None]
        parts.append(np.bincount(drawn.ravel(), minlength=rows * count).reshape(rows, count)[:, of])
    return np.concatenate(parts, 1).astype(np.float64)


def _tail(units: int) -> float:
    """The share of resamples beyond each end: 2.5% for many units, less for few."""
    quantile = student.ppf((1 - LEVEL) / 2, units - 1)
    return float(ndtr(quantile * np.sqrt(units / (units - 1))))

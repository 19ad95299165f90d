"""Statistics of resampled images, as functions of how often a resample holds each image.

Each function here prepares one statistic: it sorts once, and what it returns takes counts `(resample, image)`. With
whole counts, the value is exactly that of the data with every image repeated so many times.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from calibrant.evaluation.statistics.arrays import Array
from calibrant.evaluation.statistics.resampling import Groups, Statistic


def counted_mean(values: npt.ArrayLike) -> Statistic:
    """The mean of finite values `(image, …)`, with the result `(resample, …)`."""
    numbers = np.asarray(values, np.float64)

    def mean(counts: Array) -> Array:
        return np.tensordot(counts, numbers, 1) / counts.sum(1).reshape(-1, *[1] * (numbers.ndim - 1))

    return mean


def counted_auroc(scores: npt.ArrayLike, positive: npt.ArrayLike, classes: Groups | None = None) -> Statistic:
    """The probability that a positive image has a larger score than a negative one; a tie counts one half.

    Args:
        scores: scores `(image,)`, which may be infinite.
        positive: whether each image is positive, `(image,)`.
        classes: with classes `(image,)`, only images of the same class are compared.
    """
    runs = runs_of(np.asarray(scores, np.float64), classes)
    marked = np.asarray(positive, bool)

    def auroc(counts: Array) -> Array:
        high, low = (runs.sums(counts * of) for of in (marked, ~marked))
        below, total = runs.within(low)
        pairs = (high * total).sum(1)
        with np.errstate(invalid="ignore", divide="ignore"):
            return np.where(pairs > 0, (high * below).sum(1) / pairs, np.nan)

    return auroc


def counted_spearman(x: npt.ArrayLike, y: npt.ArrayLike, classes: Groups | None = None) -> Statistic:
    """Rank correlation of x and y; NaN where one of them takes one value only.

    Args:
        x: numbers `(image,)`.
        y: numbers `(image,)`.
        classes: with classes `(image,)`, the correlation within them: ranks are those among the images of the same
            class, from their mean and divided by the number of images, so that differences between classes do not
            count.
    """
    first, second = (runs_of(np.asarray(values, np.float64), classes) for values in (x, y))

    def spearman(counts: Array) -> Array:
        a, b = first.ranks(counts), second.ranks(counts)
        squares = (counts * a**2).sum(1) * (counts * b**2).sum(1)
        with np.errstate(invalid="ignore", divide="ignore"):
            return np.where(squares > 0, (counts * a * b).sum(1) / np.sqrt(squares), np.nan)

    return spearman


@dataclass(frozen=True)
class Runs:
    """Images sorted by class and number, in runs of equal numbers.

    Attributes:
        order: positions of the sorted images.
        starts: where each run starts among them.
        of: the run of every image, in the order of the images.
        first: the first run of each run's class.
        last: its last run.
    """

    order: Groups
    starts: Groups
    of: Groups
    first: Groups
    last: Groups

    def sums(self, values: Array) -> Array:
        """Sums of values `(resample, image)` over each run, `(resample, run)`."""
        return np.add.reduceat(values[:, self.order], self.starts, axis=1)

    def within(self, sums: Array) -> tuple[Array, Array]:
        """For sums over runs: that of all smaller numbers of the class with half of the run's own, and of the class."""
        ends = sums.cumsum(1)
        before = ends[:, self.first] - sums[:, self.first]
        return ends - before - sums / 2, ends[:, self.last] - before

    def ranks(self, counts: Array) -> Array:
        """Ranks among images of the same class, from their mean and divided by their number, `(resample, image)`."""
        middle, total = self.within(self.sums(counts))
        centred = np.divide(middle, total, out=np.full_like(middle, 0.5), where=total > 0) - 0.5
        return centred[:, self.of]


def runs_of(values: Array, classes: Groups | None = None) -> Runs:
    """Sort numbers `(image,)`, within classes `(image,)` if there are any."""
    of = np.zeros(len(values), dtype=np.int64) if classes is None else classes
    order = np.lexsort((values, of))
    sorted_values, sorted_classes = values[order], of[order]
    new = np.ones(len(order), dtype=bool)
    new[1:] = (sorted_values[1:] != sorted_values[:-1]) | (sorted_classes[1:] != sorted_classes[:-1])
    starts = np.flatnonzero(new)
    run = np.empty_like(order)
    run[order] = new.cumsum() - 1
    run_classes = sorted_classes[starts]
    first = np.searchsorted(run_classes, run_classes)
    return Runs(order, starts, run, first, np.searchsorted(run_classes, run_classes, side="right") - 1)

"""95% intervals of means over repetitions and images together, such as draws of a database and queries."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from scipy.special import ndtri, stdtrit

from calibrant.evaluation.statistics.arrays import Array
from calibrant.evaluation.statistics.resampling import Estimate
from calibrant.evaluation.statistics.separation import LEVEL, placements, wilson

_MOST = 3.0  # independent comparisons that one value of an image is worth at most, as in an AUROC

Variables = dict[str, tuple[tuple[str, ...], Any]]
_UNKNOWN = Estimate(*(np.array(np.nan) for _ in range(4)))


def stacked(name: str, dims: tuple[str, ...], estimates: Sequence[Any]) -> Variables:
    """Nested lists of estimates as variables `name`, `name_se`, `name_low` and `name_high`."""
    values = np.asarray(estimates, dtype=np.float64)
    return Estimate(*np.moveaxis(values, -1, 0)).variables(name, dims)


class _Crossed(NamedTuple):
    """A mean over repetitions and images, its standard error, and the degrees of freedom of that error."""

    mean: float
    se: float
    freedom: float

    @property
    def half_width(self) -> float:
        """Half the length of a 95% interval."""
        return float(stdtrit(self.freedom, (1 + LEVEL) / 2)) * self.se


def _crossed(values: Array) -> _Crossed:
    """The mean of `(repetition, image)` with an error that counts the chance of both; NaN entries are left out.

    With the variances of repetitions, images and the rest, σ_r², σ_i² and σ_e², the variance of the mean over R
    repetitions of n images is σ_r²/R + σ_i²/n + σ_e²/(R n). Degrees of freedom are those of Satterthwaite.
    """
    found = values[:, ~np.isnan(values).all(0)]
    if found.shape[0] < 1 or found.shape[1] < 2:
        return _Crossed(np.nan, np.nan, np.nan)
    rows, columns, grand = np.nanmean(found, 1), np.nanmean(found, 0), float(np.nanmean(found))
    repeats, images = found.shape
    of_images = columns.var(ddof=1) / images
    if repeats == 1:
        return _Crossed(grand, float(np.sqrt(of_images)), images - 1.0)
    of_rows = rows.var(ddof=1) / repeats
    rest = np.nansum((found - rows[:, None] - columns + grand) ** 2) / ((repeats - 1) * (images - 1))
    variance = max(of_rows + of_images - rest / (repeats * images), of_rows, of_images)
    spread = of_rows**2 / (repeats - 1) + of_images**2 / (images - 1)
    freedom = variance**2 / spread if spread > 0 else images - 1.0
    return _Crossed(grand, float(np.sqrt(variance)), float(freedom))


def crossed_share(values: Array) -> Estimate:
    """A share, or an AUROC, over repetitions and images, with Wilson's interval for as many images as its error tells.

    Args:
        values: `(repetition, image)`, with a mean between 0 and 1; NaN for images that take no part in a repetition.
    """
    found = _crossed(values)
    if np.isnan(found.mean):
        return _UNKNOWN
    count = float((~np.isnan(values)).any(0).sum())
    if found.se > 0:
        wanted = found.mean * (1 - found.mean) * (float(ndtri((1 + LEVEL) / 2)) / found.half_width) ** 2
        count = float(np.clip(wanted, 2.0, _MOST * np.isfinite(values).sum()))
    return Estimate(*map(np.array, (found.mean, found.se, *wilson(found.mean, count))))


def crossed_difference(values: Array) -> Estimate:
    """A mean difference over repetitions and images, with a Student interval; arguments as those of `crossed_share`."""
    found = _crossed(values)
    ends = (found.mean - found.half_width, found.mean + found.half_width)
    return Estimate(*map(np.array, (found.mean, found.se, *ends)))


def ranked(uncertainty: Array, correct: npt.NDArray[np.bool_]) -> Array:
    """A number of each image, whose mean is R-AUROC and whose standard error over images is that of R-AUROC.

    R-AUROC is the probability that a wrong image is less certain than a correct one, with one half for ties.

    Args:
        uncertainty: `(image,)`.
        correct: whether each image is retrieved or classified correctly, `(image,)`.

    Returns:
        `(image,)`; all NaN if fewer than two images are correct, or fewer than two wrong.
    """
    count, right = len(correct), int(correct.sum())
    if min(right, count - right) < 2:
        return np.full(count, np.nan)
    found = placements(uncertainty[~correct], uncertainty[correct])
    values = np.empty(count)
    values[~correct] = (found.positive - found.auroc) * count / (count - right)
    values[correct] = (found.negative - found.auroc) * count / right
    return values + found.auroc

"""AUROC: how well a score separates two sets of images, with intervals that hold near 0 and 1 too.

The AUROC of a score is the probability that it is larger for a positive image than for a negative one, where a tie
counts one half. Its variance is that of DeLong, DeLong & Clarke-Pearson (1988, Biometrics 44:837), from the placement
of every image among those of the other set. A Wald interval of that variance is empty where the sets do not overlap.
Therefore the variance is turned into the number of independent comparisons that would have it, and the interval is that
of Wilson for a share of so many (Mee 1990, JASA 85:793). The difference of two AUROCs combines both intervals with the
correlation of the two estimates (Zou & Donner 2008, Stat. Med. 27:1693).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from scipy.special import ndtri
from scipy.stats import rankdata

Array = npt.NDArray[np.float64]
LEVEL = 0.95  # of all intervals


class Separation(NamedTuple):
    """An AUROC, its standard error, and the ends of its 95% interval."""

    auroc: float
    se: float
    low: float
    high: float


UNKNOWN = Separation(np.nan, np.nan, np.nan, np.nan)


@dataclass(frozen=True)
class Placements:
    """The share of images of the other set on the right side of each image; their means are the AUROC.

    `weight` is 1, or the weight of a stratum in the pooled AUROC.
    """

    positive: Array
    negative: Array
    weight: float = 1.0

    @property
    def auroc(self) -> float:
        return float(self.positive.mean())

    def covariance(self, other: Placements) -> float:
        """Covariance of two AUROCs of the same images; with itself, the variance."""
        pairs = ((self.positive, other.positive), (self.negative, other.negative))
        return float(sum(((a - a.mean()) * (b - b.mean())).sum() / (len(a) - 1) / len(a) for a, b in pairs))

    @property
    def least_comparisons(self) -> float:
        """Comparisons of an AUROC whose variance is the largest that any two distributions have."""
        return float(min(len(self.positive), len(self.negative)))

    @property
    def most_comparisons(self) -> float:
        """Comparisons of two sets with one distribution, the most that are believed of an estimated variance.

        Near 0 and 1 the estimated variance is too small, since most placements are alike.
        """
        positive, negative = len(self.positive), len(self.negative)
        return 3.0 * positive * negative / (positive + negative + 1)


def placements(positive: npt.ArrayLike, negative: npt.ArrayLike, weight: float = 1.0) -> Placements:
    """Placements of scores among those of the other set, by ranks; infinite scores are allowed, NaN are not.

    Args:
        positive: scores of the images that the score should mark, `(n,)`.
        negative: scores of the others, `(m,)`.
        weight: weight of these images, if they are one stratum of several.
    """
    high, low = np.asarray(positive, np.float64), np.asarray(negative, np.float64)
    ranks = rankdata(np.concatenate([high, low]))
    above = (ranks[: len(high)] - rankdata(high)) / len(low)
    below = 1 - (ranks[len(high) :] - rankdata(low)) / len(high)
    return Placements(above, below, weight)


def separation(positive: npt.ArrayLike, negative: npt.ArrayLike) -> Separation:
    """AUROC of the scores of two sets, with its 95% interval; NaN scores are left out.

    Args:
        positive: scores of the positive set, `(n,)`.
        negative: scores of the negative set, `(m,)`.

    Returns:
        The AUROC; NaN if a set has fewer than two scores.
    """
    return pooled([found] if (found := _enough(positive, negative)) is not None else [])


def stratified(
    positive: npt.ArrayLike, negative: npt.ArrayLike, strata: tuple[npt.ArrayLike, npt.ArrayLike]
) -> Separation:
    """AUROC within strata of images, averaged over strata; images are compared within their stratum alone.

    Strata have the weight n m / (n + m) of their numbers of images, with which the average is most precise if all
    strata have one AUROC. Strata with fewer than two images of either set are left out.

    Args:
        positive: scores of the positive set, `(n,)`.
        negative: scores of the negative set, `(m,)`.
        strata: the stratum of every image of the two sets, integers.
    """
    return pooled(strata_of(positive, negative, strata))


def strata_of(
    positive: npt.ArrayLike, negative: npt.ArrayLike, strata: tuple[npt.ArrayLike, npt.ArrayLike]
) -> list[Placements]:
    """Placements within each stratum that has two images of both sets; arguments as those of `stratified`."""
    scores = [np.asarray(values, np.float64) for values in (positive, negative)]
    labels = [np.asarray(values) for values in strata]
    parts = (
        [values[of == label] for values, of in zip(scores, labels, strict=True)]
        for label in np.union1d(labels[0], labels[1])
    )
    return [found for high, low in parts if (found := _enough(high, low)) is not None]


def _enough(positive: npt.ArrayLike, negative: npt.ArrayLike) -> Placements | None:
    high, low = (np.asarray(values, np.float64) for values in (positive, negative))
    high, low = high[~np.isnan(high)], low[~np.isnan(low)]
    if min(len(high), len(low)) < 2:
        return None
    return placements(high, low, len(high) * len(low) / (len(high) + len(low)))


def pooled(strata: Sequence[Placements]) -> Separation:
    """The average AUROC of strata, with its interval; NaN for no strata."""
    if not strata:
        return UNKNOWN
    auroc, variance = _average(strata), _covariance(strata, strata)
    comparisons = _comparisons(strata, auroc, variance)
    return Separation(auroc, float(np.sqrt(variance)), *wilson(auroc, comparisons))


def difference(first: Sequence[Placements], second: Sequence[Placements]) -> Separation:
    """The difference of two AUROCs of the same images, with its 95% interval; NaN for no strata.

    Args:
        first: placements of the images by one score, in one or several strata.
        second: placements of the same images in the same strata by the other score.
    """
    if not first:
        return UNKNOWN
    one, other = pooled(first), pooled(second)
    variance = one.se**2 + other.se**2 - 2 * _covariance(first, second)
    both = one.se * other.se
    correlation = float(np.clip(_covariance(first, second) / both, -1, 1)) if both > 0 else 0.0
    found = one.auroc - other.auroc
    low, high = (
        np.sqrt(max(a**2 + b**2 - 2 * correlation * a * b, 0.0))
        for a, b in ((one.auroc - one.low, other.high - other.auroc), (one.high - one.auroc, other.auroc - other.low))
    )
    return Separation(found, float(np.sqrt(max(variance, 0.0))), float(found - low), float(found + high))


def _average(strata: Sequence[Placements]) -> float:
    return float(np.average([part.auroc for part in strata], weights=[part.weight for part in strata]))


def _covariance(first: Sequence[Placements], second: Sequence[Placements]) -> float:
    """Covariance of two averages over the same strata, which are independent of each other."""
    total = sum(part.weight for part in first)
    pairs = zip(first, second, strict=True)
    return float(sum((one.weight / total) ** 2 * one.covariance(other) for one, other in pairs))


def _comparisons(strata: Sequence[Placements], auroc: float, variance: float) -> float:
    """Number of independent comparisons with the estimated variance, kept between what is possible and believable."""
    total = sum(part.weight for part in strata)
    shares = np.array([part.weight / total for part in strata])
    least, most = (
        1 / float(np.sum(shares**2 / np.array([getattr(part, name) for part in strata])))
        for name in ("least_comparisons", "most_comparisons")
    )
    if variance == 0:
        return least
    return float(np.clip(auroc * (1 - auroc) / variance, least, most))


def wilson(share: float, count: float) -> tuple[float, float]:
    """Wilson's interval of a share of `count` independent comparisons."""
    z = float(ndtri((1 + LEVEL) / 2))
    centre = (share + z**2 / (2 * count)) / (1 + z**2 / count)
    half = z / (1 + z**2 / count) * np.sqrt(share * (1 - share) / count + z**2 / (4 * count**2))
    return max(float(centre - half), 0.0), min(float(centre + half), 1.0)

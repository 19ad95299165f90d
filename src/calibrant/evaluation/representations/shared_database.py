"""The part of an image's influence on retrieval that it has as a neighbour of others.

If the queries are the database, each image is judged as a query and is also what other queries find. Resampling of
queries alone makes intervals too narrow: it leaves out the second part. Resampling of the database would not do either,
since copies of an image would find each other. So the second part is added to first order: what the statistic would
lose if the image, or its whole class, were not in the database. By the inequality of Efron & Stein (1981, Ann. Stat.
9:586) variances from such deletions are too large on average, if anything: in simulations, standard errors over
classes are 1.04 to 1.14 times the spread over sets of new classes, those over images 1.2 to 1.4 times the spread over
new images of the same classes. Without the second part they are 0.6 to 0.9 of it.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from calibrant.evaluation.statistics.arrays import Array
from calibrant.evaluation.statistics.resampling import Groups, Statistic

Mask = npt.NDArray[np.bool_]

_NEXT = 8  # images over whose classes an expectation is taken


def with_database(statistic: Statistic, database: Array) -> Statistic:
    """A statistic between 0 and 1 whose resamples change the database too, to first order.

    Args:
        statistic: from counts `(resample, image)` to values `(resample, …)`, for a fixed database.
        database: what each image is worth to the statistic as a neighbour of others, times the number of images,
            `(image, …)`; see `worth_as_neighbour`.
    """

    def both(counts: Array) -> Array:
        moved = statistic(counts) + np.tensordot(counts - 1, database, 1) / counts.shape[1]
        return np.clip(moved, 0.0, 1.0)

    return both


def worth_as_neighbour(index: Groups, right: Mask, units: Groups, k: int, worth: Array) -> Array:
    """What the queries would lose together if an image were not in the database, with all images of its unit.

    Args:
        index: neighbours of each query, more than k of them, as positions among the queries, `(image, neighbour)`.
        right: whether each has the class of the query, `(image, neighbour)`.
        units: what is resampled as a whole, `(image,)`; a query of the same unit is not there either.
        k: number of neighbours that make a query right, if one of them is.
        worth: value of each query if it is wrong, and if it is right, `(image, 2)`.

    Returns:
        Value with the image minus value without it, summed over the queries that find it, `(image,)`. Where a unit's
        images fill the whole list of neighbours, what comes behind them counts as wrong.
    """
    of, rows = units[index], np.arange(len(index))
    now = right[:, :k].any(1).astype(np.int64)
    found = np.zeros(len(index))
    for place in range(k):
        then = _without(right, of != of[:, place, None], k)
        first = ~(of[:, :place] == of[:, place, None]).any(1)
        expected = worth[:, 0] + then * (worth[:, 1] - worth[:, 0])
        lost = np.where(first & (of[:, place] != units), worth[rows, now] - expected, 0.0)
        found += np.bincount(index[:, place], lost, len(index))
    return found


def _without(right: Mask, left: Mask, k: int) -> Array:
    """Probability that a query is right if only the images that are left were there, `(image,)`.

    Which image takes the last of the k places is chance, which would count twice. So its class is averaged over the
    images that come next.
    """
    ranks = left.cumsum(1)
    surely = (right & left & (ranks < k)).any(1)
    next_ones = left & (ranks >= k) & (ranks < k + _NEXT)
    return np.where(surely, 1.0, (right & next_ones).sum(1) / np.maximum(next_ones.sum(1), 1))


def worth_for_auroc(scores: Array, positive: Mask) -> Array:
    """First-order contribution of each image to an AUROC if it is negative, and if it is positive, `(image, 2)`.

    Args:
        scores: `(image,)`.
        positive: whether each image is positive now, `(image,)`; both kinds have to be there.
    """
    of_negative, of_positive = (_share_below(scores, np.sort(scores[part])) for part in (~positive, positive))
    auroc, share = of_negative[positive].mean(), positive.mean()
    return np.stack([(1 - of_positive - auroc) / (1 - share), (of_negative - auroc) / share], 1)


def _share_below(scores: Array, others: Array) -> Array:
    """Share of the sorted others that each score exceeds; a tie counts one half."""
    ends = [np.searchsorted(others, scores, side=side) for side in ("left", "right")]
    return (ends[0] + ends[1]) / (2 * len(others))

"""Bands that hold the whole distribution function of uniform values, with an exact probability."""

from __future__ import annotations

from functools import lru_cache

import numpy as np
import numpy.typing as npt
from scipy.stats import binom, poisson

Array = npt.NDArray[np.float64]

LEVEL = 0.95  # probability that a band holds a whole curve
STEPS = 100  # number of steps of the grid on which distribution functions are drawn


@lru_cache(maxsize=16)
def ecdf_band(count: int, level: float = LEVEL, steps: int = STEPS) -> tuple[Array, Array]:
    """Simultaneous band for the distribution function of `count` uniform values.

    At every point the band is a central interval of the Binomial distribution. All intervals have the same probability,
    which is chosen so that the whole curve lies inside with probability `level` (Säilynoja, Bürkner & Vehtari 2022,
    Statistics and Computing 32:32). It is found exactly: the counts are those of a Poisson process, given its last one.

    Args:
        count: number of values, independent and uniform on (0, 1).
        level: probability that no point of the grid is outside; the actual one is slightly larger, since counts are
            whole numbers.
        steps: number of steps of the grid 1/steps, …, 1 − 1/steps.

    Returns:
        Lower and upper end of F at the points of the grid; the ends belong to the band.
    """
    grid = np.arange(1, steps) / steps

    def ends(log_tail: float) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
        tail = np.exp(log_tail)
        return binom.ppf(tail, count, grid).astype(int), binom.isf(tail, count, grid).astype(int)

    wide, narrow = np.log((1.0 - level) / (2 * steps)), np.log((1.0 - level) / 2)  # Bonferroni; as if one point
    for _ in range(14):
        middle = (wide + narrow) / 2
        wide, narrow = (middle, narrow) if _inside(count, *ends(middle)) >= level else (wide, middle)
    low, high = ends(wide)
    return low / count, high / count


def _inside(count: int, low: npt.NDArray[np.int64], high: npt.NDArray[np.int64]) -> float:
    """Probability that the numbers of values up to each point of the grid all lie between `low` and `high`."""
    rate = count / (len(low) + 1)
    step = poisson.pmf(np.arange(poisson.isf(1e-16, rate) + 1), rate)
    state, first = np.ones(1), 0  # probabilities of the counts `first`, `first + 1`, …
    for least, most in zip(low.tolist(), high.tolist(), strict=True):
        state = np.convolve(state, step)[max(0, least - first) : most + 1 - first]
        first = max(first, least)
    return float(np.convolve(state, step)[count - first] / poisson.pmf(count, count))

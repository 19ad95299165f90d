"""Page's test: whether a statistic of images follows the order of the levels at which they are shown."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from scipy.stats import page_trend_test, rankdata

Array = npt.NDArray[np.float64]


class Trend(NamedTuple):
    """Page's trend test over images, in both directions.

    Attributes:
        correlation: mean over images of the rank correlation of level and statistic, from −1 to 1: the effect size,
            which is Page's L on another scale.
        p_rises: p value of "the statistic does not rise with the level".
        p_falls: p value of "the statistic does not fall with the level".
    """

    correlation: float
    p_rises: float
    p_falls: float


def trend(values: npt.ArrayLike) -> Trend:
    """Test whether values `(image, level)` rise or fall with the level; images with NaN are left out.

    Values of an image that are equal share their ranks. SciPy's p values do not account for such ties, which makes them
    too large, never too small.

    Returns:
        NaN for fewer than two images or three levels.
    """
    rows = np.asarray(values, np.float64)
    rows = rows[np.isfinite(rows).all(1)]
    count, levels = rows.shape
    if count < 2 or levels < 3:
        return Trend(np.nan, np.nan, np.nan)
    order = np.arange(1, levels + 1)
    correlation = 12 * ((rankdata(rows, axis=1) * (order - order.mean())).sum(1) / (levels**3 - levels)).mean()
    rises, falls = (page_trend_test(rows, predicted_ranks=ranks).pvalue for ranks in (order, order[::-1]))
    return Trend(float(correlation), float(rises), float(falls))

"""Errors of statistics over many data whose draws are shared.

Where latents are shared, one draw moves the posteriors of all data, so that the errors of single data are correlated.
The covariance V of the errors (one row per datum, and per pair of latents for correlations) follows from the scatter of
blocks of draws: every statistic changes to first order by the mean of an influence series, whose block means are added
here. Only the Gram matrix of the blocks is kept, which is enough for averages and for mean squares.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from calibrant.evaluation.statistics.draws import BLOCKS
from calibrant.evaluation.statistics.shapes import FEW_BLOCKS

Array = npt.NDArray[np.float64]


@dataclass
class Scatter:
    """Sums over data of block means of influence series, for several statistics at once."""

    count: int = 0  # number of errors: data, times entries of vectors
    total: Array = field(default_factory=lambda: np.zeros(()))  # (statistic, block)
    gram: Array = field(default_factory=lambda: np.zeros(()))  # (statistic, block, block)

    def add(self, blocks: Array) -> None:
        """Add a datum's block means `(statistic, block)`, or `(statistic, entry, block)` for vectors."""
        centred = blocks - blocks.mean(-1, keepdims=True)
        rows = centred[:, None] if centred.ndim == 2 else centred
        self.count += rows.shape[1]
        self.total = self.total + rows.sum(1)
        self.gram = self.gram + rows.transpose(0, 2, 1) @ rows

    def statistics(self) -> dict[str, Array]:
        """Errors of averages and of mean squares over data (and entries), `(statistic,)` each.

        `average_se`: standard error of the average error. With V the covariance of n errors: `trace_square`, tr V² / n²
        (unbiased for a Normal sample), and `largest`, the largest eigenvalue of V over n.
        """
        n, freedom = self.count, BLOCKS - 1
        scatter = self.gram / (freedom * BLOCKS)
        trace = np.trace(scatter, axis1=1, axis2=2)
        square = freedom**2 / ((freedom - 1) * (freedom + 2)) * ((scatter**2).sum((1, 2)) - trace**2 / freedom)
        average = np.sqrt((self.total**2).sum(1) / (freedom * BLOCKS)) / n
        return {
            "average_se": FEW_BLOCKS * average,
            "trace_square": np.maximum(square, trace**2 / n) / n**2,
            "largest": np.linalg.eigvalsh(scatter)[:, -1] / n,
        }

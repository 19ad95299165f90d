"""The shape of each latent's marginal: the distribution function of the reference at quantiles of the guide."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from calibrant.evaluation.statistics.draws import Draws

Array = npt.NDArray[np.float64]

STEP = 0.05
PROBABILITIES = np.arange(1, 20) * STEP
FEW_BLOCKS = (
    1.15  # factor by which 4 to 5 standard errors from so few blocks are too short (Student t in place of Normal)
)


@dataclass
class Shapes:
    """F_reference(q_guide(p)) − p at each p of `PROBABILITIES`, summed over data, with the noise of the sum.

    The noise of the reference is that at its own quantiles, which are the guide's if both agree.

    Attributes:
        together: whether all data share their draws, so that their errors do not average out.
    """

    together: bool
    count: int = 0
    total: Array = field(default_factory=lambda: np.zeros(()))
    noise: Array = field(default_factory=lambda: np.zeros(()))

    def add(self, a: Draws, r: Draws) -> None:
        """Add a datum."""
        cuts, p = a.quantiles(PROBABILITIES), PROBABILITIES[:, None]
        below = r.below(cuts)
        less = r.below(cuts, "left")  # at an atom, every probability between the two is right
        around = np.concatenate((np.zeros_like(below[:1]), below, np.ones_like(below[:1])))
        ratio = (around[2:] - around[:-2]) / (2.0 * STEP)  # density of the reference over that of the guide
        self.count += 1
        tied = below - less > 1.5 / r.count  # more than one draw
        outside = np.where(p > below, below - p, np.where(p < less, less - p, 0.0))
        self.total = self.total + np.where(tied, outside, below - p)
        if self.together:
            self.noise = self.noise + _blocks(r, cuts) - ratio[..., None] * _blocks(a, cuts)
            return
        of_guide = ratio**2 * (p * (1.0 - p) / a.count if a.independent else _scatter(_blocks(a, cuts)))
        size = r.count + 2.0  # a share of 0 or 1 also has an error
        share = (below * r.count + 1.0) / size
        of_reference = (
            share * (1.0 - share) / size if r.independent else _scatter(_blocks(r, r.quantiles(PROBABILITIES)))
        )
        self.noise = self.noise + of_guide + np.maximum(of_reference, share * (1.0 - share) / size)

    def statistics(self) -> dict[str, Array]:
        """`shape_difference` ± `shape_difference_se`, averages over data, `(probability, latent)`."""
        variance = FEW_BLOCKS**2 * _scatter(self.noise) if self.together else self.noise
        return {
            "shape_difference": self.total / self.count,
            "shape_difference_se": np.sqrt(variance) / self.count,
        }


def _blocks(draws: Draws, cuts: Array) -> Array:
    """Block means of the distribution function of one side at cuts `(probability, latent)`, with blocks last."""
    return np.stack([draws.blocks((draws.rows <= cut[:, None]).astype(np.float64)) for cut in cuts])


def _scatter(blocks: Array) -> Array:
    """Variance of the mean of blocks along the last dimension."""
    return blocks.var(-1, ddof=1) / blocks.shape[-1]

"""What the posterior of a Gaussian scale mixture is, exactly and in its limits: x = s A z + ε, z ~ N(0, I), s > 0.

In units of the noise and along the singular vectors of the dictionary, an image is u_j = s g_j c_j + N(0, 1) with gains
g_j > 0 for n of the k coordinates c of z; the other coordinates have gain 0. All functions are derived in
docs/papers/ea-vae-analytic.md, and compared there with the quadrature of `calibrant.inference.reference`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy.optimize import brentq
from scipy.special import gammaln, lambertw

Array = npt.NDArray[np.float64]
_LOG_SCALES = (-60.0, 60.0)  # where the mode of log s is searched for


@dataclass(frozen=True)
class GammaPrior:
    """s ~ Gamma(shape, rate)."""

    shape: float
    rate: float

    @property
    def mean(self) -> float:
        """The mean of s."""
        return self.shape / self.rate

    def slope(self, scale: float) -> float:
        """Derivative of the log density of log s."""
        return self.shape - self.rate * scale

    def bend(self, scale: float) -> float:
        """Second derivative of the log density of log s."""
        return -self.rate * scale


@dataclass(frozen=True)
class LogNormalPrior:
    """log s ~ Normal(loc, width)."""

    loc: float
    width: float

    @property
    def mean(self) -> float:
        """The mean of s."""
        return math.exp(self.loc + self.width**2 / 2)

    def slope(self, scale: float) -> float:
        """Derivative of the log density of log s."""
        return (self.loc - math.log(scale)) / self.width**2

    def bend(self, scale: float) -> float:
        """Second derivative of the log density of log s."""
        return -1 / self.width**2


@dataclass(frozen=True)
class Limit:
    """A limit of the posterior.

    Attributes:
        mean: E[s | x].
        cv: standard deviation over mean of s.
        lost: how much less than the prior's the variances of the n coordinates given s are in sum, of at most n.
        between: variance of z, summed over the coordinates, that comes from not knowing s.
    """

    mean: float
    cv: float
    lost: float
    between: float


def blank_limit(prior: GammaPrior | LogNormalPrior, gains: Array) -> Limit:
    """The posterior of an image that is blank, for a dictionary with many directions.

    With G² = Σ g_j², the likelihood of s is exp(−G² s²/2) but for terms of the order 1/R, R = G⁴ / Σ g_j⁴. Under a
    Gamma prior, s² G² then has a χ² distribution with `shape` degrees of freedom; under a LogNormal prior, log s is
    nearly Normal. The first correction of the mean in 1/R, and in the prior's rate, is included.
    """
    power = float((gains**2).sum())
    directions = power**2 / float((gains**4).sum())
    if isinstance(prior, GammaPrior):
        a = prior.shape
        mean = math.sqrt(2 / power) * math.exp(gammaln((a + 1) / 2) - gammaln(a / 2))
        variance = a / power - mean**2
        corrected = mean * (1 + (2 * a + 3) / (4 * directions)) - prior.rate * variance
        return Limit(corrected, math.sqrt(variance) / mean, prior.slope(corrected), 0.0)
    precision = 1 / prior.width**2
    y = precision / 2 * float(lambertw(2 * power * math.exp(2 * prior.loc) / precision).real)
    variance = 1 / (precision + 2 * y)
    shift = variance * y**2 / directions - 2 * y * variance**2
    return Limit(math.sqrt(y / power) * (1 + variance / 2 + shift), math.sqrt(variance), y, 0.0)


def bright_limit(prior: GammaPrior | LogNormalPrior, gains: Array, code: float) -> Limit:
    """The posterior of an image of high contrast.

    Args:
        prior: the prior of s.
        gains: the n gains, all positive.
        code: squared norm of the smallest s z that gives the image, Σ u_j² / g_j².
    """
    n = len(gains)

    def slope(log_scale: float) -> float:
        return prior.slope(math.exp(log_scale)) - n + code * math.exp(-2 * log_scale)

    scale = math.exp(brentq(slope, *_LOG_SCALES, xtol=1e-14))
    explained = n - prior.slope(scale)  # the squared norm of z
    variance = 1 / (2 * explained - prior.bend(scale))  # of log s
    lost = n - float((1 / gains**2).sum()) / scale**2
    return Limit(scale, math.sqrt(variance), lost, explained * variance)

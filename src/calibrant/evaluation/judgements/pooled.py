"""Statistics over data: averages and root mean squares of errors, with their p-values and intervals.

Errors are independent over data, since every datum has its own draws, except where latents are shared: then one draw
moves all data, and the comparison holds the errors of averages and of mean squares (`Together`). Over the latents of
one datum errors are not independent. Latents are therefore counted as fully correlated: the standard error of their
average is the average of their standard errors, an upper bound for any correlation. This costs no `pass`, because every
single latent, whose error is as large, has to pass as well.

Data without a reference count as right where an error is to be shown: a `fail` holds whatever the guide does there.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
import xarray as xr
from scipy.special import chdtrc, chdtri, ndtr

from calibrant.evaluation.judgements.decisions import WIDTH, Statistic, normal_statistic

Array = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Together:
    """Errors of a statistic over data that share their draws, with V the covariance of the errors of n data.

    Attributes:
        average_se: standard error of the average.
        trace_square: tr V² / n².
        largest: largest eigenvalue of V over n.
    """

    average_se: float
    trace_square: float
    largest: float


def together_of(result: xr.Dataset, quantity: str, entries: Sequence[str]) -> Together | None:
    """The errors that data share, for entries that are averaged; None where every datum has its own draws."""
    if "together" not in result.coords:
        return None
    part = result.sel(together=[f"{quantity} of {entry}" if entry else quantity for entry in entries])
    trace = float(np.sqrt(part["together_trace_square"].values).mean())
    return Together(
        float(part["together_average_se"].mean()), trace**2, float(np.sqrt(part["together_largest"].values).mean()) ** 2
    )


@dataclass(frozen=True)
class Limits:
    """What all statistics of a comparison have in common.

    Attributes:
        kept: share of the data that have a reference.
    """

    kept: float = 1.0


def average(
    label: str, note: str, error: Array, se: Array, margin: float, limits: Limits, together: Together | None = None
) -> Statistic:
    """The average of errors `(data, latent)`."""
    if not error.size:
        return normal_statistic(label, note, np.nan, np.nan, margin)
    mean, spread = float(error.mean()), float(np.sqrt((se.mean(1) ** 2).sum())) / len(error)
    if together is not None:
        spread = together.average_se
    return missing_as_right(normal_statistic(label, note, mean, spread, margin), limits)


def missing_as_right(found: Statistic, limits: Limits) -> Statistic:
    """An average whose p-value counts the data without a reference as right."""
    if limits.kept == 1.0:
        return found
    of_all = normal_statistic("", "", limits.kept * found.effect, limits.kept * found.se, found.margin)
    return replace(found, p_inside=of_all.p_inside)


def root(
    label: str, note: str, square: Array, noise: Array, margin: float, limits: Limits, together: Together | None = None
) -> Statistic:
    """The root of a debiased mean square, averaged over data.

    A squared error with noise variance v has variance 2v² + 4 δ² v around a true error δ. For the interval δ is taken
    at the margin, which is the hypothesis to be rejected: at the observed δ the interval would be too short just where
    noise cancels an error. Its lower end respects that a sum of few squares is skewed like χ².

    Args:
        label: see `Statistic`.
        note: see `Statistic`.
        square: debiased squared errors `(data, latent)`.
        noise: the noise variances v that were subtracted.
        margin: root-mean-square error that passes.
        limits: the share of the data that have a reference.
        together: errors that data share.
    """
    if not square.size:
        return Statistic(label, note, np.nan, np.nan, np.nan, np.nan, np.nan, margin, signed=False)
    square, noise = square.reshape(len(square), -1).mean(1), noise.reshape(len(noise), -1).mean(1)
    errors = _Squares(square, noise, together)
    mean, at_margin = float(square.mean()), errors.spread(margin**2)
    independent = errors.independent
    lower = float((chdtri(independent, ndtr(-WIDTH)) - independent) / np.sqrt(2.0 * independent))
    scores = (limits.kept * mean - margin**2) / max(limits.kept * errors.own_spread(margin**2), 1e-300)
    p_value = float(chdtrc(independent, max(0.0, independent + np.sqrt(2.0 * independent) * scores)))
    effect = float(np.sqrt(max(mean, 0.0)))
    low = float(np.sqrt(max(mean - lower * at_margin, 0.0)))
    high = float(np.sqrt(max(mean, 0.0) + WIDTH * at_margin))
    error = float(np.sqrt(effect**2 + errors.spread(effect**2))) - effect
    return Statistic(label, note, effect, error, low, high, p_value, margin, signed=False)


@dataclass(frozen=True)
class _Squares:
    """The standard error of a mean of debiased squares `(data,)`."""

    square: Array
    noise: Array
    together: Together | None

    @property
    def independent(self) -> float:
        """The effective number of independent data, given their noise variances."""
        if self.together is not None:
            return max(1.0, float(self.noise.mean()) ** 2 / max(self.together.trace_square, 1e-300))
        return max(1.0, float(self.noise.sum() ** 2 / max((self.noise**2).sum(), 1e-300)))

    def spread(self, true_square: float) -> float:
        """The standard error if the true errors have this mean square, equally large for all data."""
        if self.together is not None:
            return float(np.sqrt(2.0 * self.together.trace_square + 4.0 * true_square * self.together.largest))
        return float(np.sqrt((2.0 * self.noise**2 + 4.0 * true_square * self.noise).sum())) / len(self.noise)

    def own_spread(self, least: float) -> float:
        """Like `spread`, but errors may lie where the noise is large (a datum both hard and slow to mix)."""
        if self.together is not None:
            return self.spread(max(least, float(self.square.mean())))
        own = np.maximum(least, self.square)
        return float(np.sqrt((2.0 * self.noise**2 + 4.0 * own * self.noise).sum())) / len(self.noise)

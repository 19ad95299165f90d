"""Statistics of each latent's marginal: mean, sd, coverage, Wasserstein distance, with their Monte Carlo errors."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from calibrant.inference.diagnostics import ess

Array = npt.NDArray[np.float64]


BLOCKS = 40  # number of contiguous parts of the draws; chains that pass the gate have 10 effective draws in each
_GRID = 40
TINY = 1e-12  # smallest sd (in reference sd), given to constant latents so that its log stays finite


@dataclass(frozen=True)
class Draws:
    """The draws of one posterior from one tree, `(chain, draw, latent)`."""

    values: Array
    independent: bool

    @property
    def flat(self) -> Array:
        """The draws chain by chain, `(chain · draw, latent)`."""
        return self.values.reshape(-1, self.values.shape[-1])

    def size(self, series: Array) -> Array:
        """Effective number of draws for the mean of each column of a series `(chain · draw, latent)`."""
        if self.independent:
            return np.full(series.shape[1], float(len(series)))
        return ess(series.reshape(self.values.shape))

    def variance(self, influence: Array) -> Array:
        """Monte Carlo variance of the mean of each column of an influence series `(chain · draw, latent)`."""
        return influence.var(0, ddof=1) / self.size(influence)


def marginal_statistics(a: Draws, r: Draws, level: float) -> dict[str, Array]:
    """Statistics of each latent's marginal, arrays `(latent,)`."""
    centre, scale = r.flat.mean(0), r.flat.std(0, ddof=1)
    a = Draws((a.values - centre) / scale, a.independent)
    r = Draws((r.values - centre) / scale, r.independent)
    found = _moments(a, r) | _coverage(a, r, level) | _wasserstein(a, r)
    return {name: np.asarray(values, dtype=np.float64) for name, values in found.items()}


def _moments(a: Draws, r: Draws) -> dict[str, Array]:
    """Errors of mean and sd, in units in which the reference has mean 0 and sd 1."""
    mean = a.flat.mean(0)
    sd = np.maximum(a.flat.std(0, ddof=1), TINY)
    log_sd_a = ((a.flat - mean) ** 2 / sd**2 - 1.0) / 2.0  # influence of a draw on the log of its side's sd
    log_sd_r = (r.flat**2 - 1.0) / 2.0
    log_variance = a.variance(log_sd_a) + r.variance(log_sd_r)
    return {
        "mean_error": mean,
        "mean_error_se": np.sqrt(a.variance(a.flat) + r.variance(r.flat + mean * log_sd_r)),
        "sd_ratio": sd,
        "sd_ratio_se": sd * np.sqrt(log_variance),
    }


def _coverage(a: Draws, r: Draws, level: float) -> dict[str, Array]:
    """Mass of the reference between two quantiles of the guide.

    With Weibull's plotting positions its expectation is exactly `level` if both sides are equal. The guide's part of
    the error is that of its quantiles times the ratio of the densities there, which is estimated from the reference
    mass in a narrow bracket of guide quantiles.
    """
    tail = (1.0 - level) / 2.0
    width = tail / 2.0
    probabilities = [tail - width, tail, tail + width, 1.0 - tail - width, 1.0 - tail, 1.0 - tail + width]
    cuts = np.quantile(a.flat, probabilities, axis=0, method="weibull")
    inside = ((r.flat >= cuts[1]) & (r.flat <= cuts[4])).astype(np.float64)
    below = np.stack([(r.flat <= cut).mean(0) for cut in cuts])
    ratio_low, ratio_high = (below[2] - below[0]) / (2.0 * width), (below[5] - below[3]) / (2.0 * width)
    influence = ratio_high * (1.0 - tail - (a.flat <= cuts[4])) - ratio_low * (tail - (a.flat <= cuts[1]))
    coverage = inside.mean(0)
    size = r.size(inside)
    rounded = (coverage * size + 1.0) / (size + 2.0)  # an observed coverage of 0 or 1 also has an error
    own = np.quantile(r.flat, [tail, 1.0 - tail], axis=0)
    null_size = r.size(((r.flat >= own[0]) & (r.flat <= own[1])).astype(np.float64))
    return {
        "coverage": coverage,
        "coverage_se": np.sqrt(a.variance(influence) + rounded * (1.0 - rounded) / size),
        "coverage_null_se": np.sqrt(level * (1.0 - level) * (1.0 / a.size(a.flat) + 1.0 / null_size)),
    }


def _wasserstein(a: Draws, r: Draws) -> dict[str, Array]:
    """1-Wasserstein distance in reference sd, and its expectation for equal posteriors.

    W = ∫ |F_a − F_r| dx. Far from equality its error is linear in the draws: ± the integral of the sign of F_a − F_r up
    to a draw. Near equality |·| folds the noise, which reduces its variance. Between the two, the variance is taken to
    change as that of the absolute value of one normal variable, which is close to 1 − (1 − v₀) (m₀ / m)² (m its mean,
    v₀ and m₀ the values at zero).
    """
    distance, potential_a, potential_r = _transport(a.flat, r.flat)
    linear = a.variance(potential_a) + r.variance(potential_r - distance * (r.flat**2 - 1.0) / 2.0)
    null, null_variance = _null_wasserstein(a, r)
    folded = np.minimum(1.0, null / np.maximum(distance, TINY)) ** 2
    return {
        "wasserstein": distance,
        "wasserstein_se": np.sqrt(folded * null_variance + (1.0 - folded) * linear),
        "wasserstein_null": null,
        "wasserstein_null_se": np.sqrt(null_variance),
    }


def _transport(a: Array, r: Array) -> tuple[Array, Array, Array]:
    """∫ |F_a − F_r| dx per latent, and for every draw of both sides the integral of the sign of F_a − F_r up to it."""
    pooled = np.concatenate((a, r))
    order = pooled.argsort(axis=0)
    width = np.diff(np.take_along_axis(pooled, order, axis=0), axis=0)
    gap = np.cumsum(np.where(order < len(a), 1.0 / len(a), -1.0 / len(r)), axis=0)[:-1]
    rising = np.zeros_like(pooled)
    np.cumsum(np.sign(gap) * width, axis=0, out=rising[1:])
    potential = np.empty_like(pooled)
    np.put_along_axis(potential, order, rising, axis=0)
    return (np.abs(gap) * width).sum(0), potential[: len(a)], potential[len(a) :]


def _null_wasserstein(a: Draws, r: Draws) -> tuple[Array, Array]:
    """Mean and variance of W for two samples of the reference posterior with these sizes and correlations.

    F_a − F_r is then a normal process: E|·| = √(2/π) sd at every point, and the covariance of two absolute values is
    that of a bivariate normal. The grid is dense in the tails.
    """
    edges = np.sin(np.linspace(0.0, np.pi / 2.0, _GRID + 1)) ** 2
    p = np.sin(np.pi / 2.0 * (np.arange(_GRID) + 0.5) / _GRID) ** 2
    quantiles = np.quantile(r.flat, np.concatenate((edges, p)), axis=0)
    width = np.diff(quantiles[: _GRID + 1], axis=0).T
    covariance = _cdf_covariance(a, p, np.quantile(a.flat, p, axis=0)) + _cdf_covariance(r, p, quantiles[_GRID + 1 :])
    sd = np.sqrt(np.diagonal(covariance, axis1=1, axis2=2))
    rho = np.clip(covariance / np.maximum(sd[:, :, None] * sd[:, None, :], TINY), -1.0, 1.0)
    folded = 2.0 / np.pi * (np.sqrt(1.0 - rho**2) + rho * np.arcsin(rho) - 1.0)
    noise = width * sd
    return np.sqrt(2.0 / np.pi) * noise.sum(1), np.einsum("lk,lkj,lj->l", noise, folded, noise)


def _cdf_covariance(draws: Draws, p: Array, cuts: Array) -> Array:
    """Covariance `(latent, cut, cut)` of the empirical distribution function at its quantiles `cuts` `(cut, latent)`.

    It is that of a Brownian bridge for independent draws, and is estimated from the scatter of blocks for MCMC.
    """
    if draws.independent:
        bridge = np.minimum.outer(p, p) - np.outer(p, p)
        return np.broadcast_to(bridge / len(draws.flat), (cuts.shape[1], len(p), len(p)))
    below = np.stack([cut_into_blocks(draws.flat <= cut).mean(1) for cut in cuts])
    scatter = (below - below.mean(1, keepdims=True)).transpose(2, 0, 1)
    return scatter @ scatter.transpose(0, 2, 1) / (BLOCKS * (BLOCKS - 1))


def cut_into_blocks(x: np.ndarray) -> np.ndarray:
    """Cut `(draw, latent)` into contiguous blocks `(block, draw, latent)`, dropping the remainder of the division."""
    size = len(x) // BLOCKS
    return x[: size * BLOCKS].reshape(BLOCKS, size, -1)

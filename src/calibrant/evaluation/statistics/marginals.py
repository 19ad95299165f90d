"""Statistics of each latent's marginal: mean, sd, coverage, Wasserstein distance, with their Monte Carlo errors."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from calibrant.evaluation.statistics.draws import BLOCKS, TINY, Draws

Array = npt.NDArray[np.float64]

_GRID = 40


def marginal_statistics(a: Draws, r: Draws, level: float) -> dict[str, Array]:
    """Statistics of each latent's marginal, arrays `(latent,)`, from draws in units of the reference's mean and sd."""
    return moments(a, r) | _coverage(a, r, level) | _wasserstein(a, r)


def moments(a: Draws, r: Draws) -> dict[str, Array]:
    """Errors of mean and sd, in units in which the reference has mean 0 and sd 1."""
    mean, sd = centre_and_spread(a)
    of_a, of_r = mean_influence(a), mean_influence(r)
    log_a, log_r = log_sd_influence(a), log_sd_influence(r)
    return {
        "mean_error": mean,
        "mean_error_se": np.sqrt(a.variance(of_a) + r.variance(of_r + mean[:, None] * log_r)),
        "sd_ratio": sd,
        "sd_ratio_se": sd * np.sqrt(a.variance(log_a) + r.variance(log_r)),
    }


def centre_and_spread(draws: Draws) -> tuple[Array, Array]:
    """Mean and sd of each latent; the sd of a constant latent is not quite zero."""
    return draws.rows.mean(1), np.maximum(draws.rows.std(1, ddof=1), TINY)


def mean_influence(draws: Draws) -> Array:
    """First-order effect of each draw on its side's mean, `(latent, chain · draw)`."""
    return draws.rows - draws.rows.mean(1, keepdims=True)


def log_sd_influence(draws: Draws) -> Array:
    """First-order effect of each draw on the log of its side's sd, `(latent, chain · draw)`."""
    mean, sd = centre_and_spread(draws)
    return (((draws.rows - mean[:, None]) / sd[:, None]) ** 2 - 1.0) / 2.0


def _coverage(a: Draws, r: Draws, level: float) -> dict[str, Array]:
    """Mass of the reference between two quantiles of the guide.

    Its expectation is exactly `level` if both sides are equal. The guide's part of the error is that of its quantiles
    times the ratio of the densities there, which is estimated from the reference mass in a narrow bracket of guide
    quantiles.
    """
    tail = (1.0 - level) / 2.0
    width = tail / 2.0
    probabilities = [tail - width, tail, tail + width, 1.0 - tail - width, 1.0 - tail, 1.0 - tail + width]
    cuts = a.quantiles(probabilities)
    below = r.below(cuts)
    ratio_low, ratio_high = (below[2] - below[0]) / (2.0 * width), (below[5] - below[3]) / (2.0 * width)
    low, high = a.rows <= cuts[1][:, None], a.rows <= cuts[4][:, None]
    influence = ratio_high[:, None] * (1.0 - tail - high) - ratio_low[:, None] * (tail - low)
    coverage = _inside(r, cuts[1], cuts[4]).mean(1)
    size = r.size(_inside(r, cuts[1], cuts[4]))
    rounded = (coverage * size + 1.0) / (size + 2.0)  # an observed coverage of 0 or 1 also has an error
    null_size = r.size(_inside(r, *r.quantiles([tail, 1.0 - tail])))
    return {
        "coverage": coverage,
        "coverage_se": np.sqrt(a.variance(influence) + rounded * (1.0 - rounded) / size),
        "coverage_null_se": np.sqrt(level * (1.0 - level) * (1.0 / a.size(a.rows) + 1.0 / null_size)),
    }


def coverage_blocks(a: Draws, r: Draws, level: float) -> Array:
    """Block means of the influence of draws on the coverage, `(latent, block)`, where both densities are alike."""
    tail = (1.0 - level) / 2.0
    low, high = a.quantiles([tail, 1.0 - tail])
    return r.blocks(_inside(r, low, high)) - a.blocks(_inside(a, low, high))


def _inside(draws: Draws, low: Array, high: Array) -> Array:
    return ((draws.rows >= low[:, None]) & (draws.rows <= high[:, None])).astype(np.float64)


def _wasserstein(a: Draws, r: Draws) -> dict[str, Array]:
    """1-Wasserstein distance in reference sd, and its expectation for equal posteriors.

    W = ∫ |F_a − F_r| dx. Far from equality its error is linear in the draws: ± the integral of the sign of F_a − F_r up
    to a draw. Near equality |·| folds the noise, which reduces its variance. Between the two, the variance is taken to
    change as that of the absolute value of one normal variable, which is close to 1 − (1 − v₀) (m₀ / m)² (m its mean,
    v₀ and m₀ the values at zero).
    """
    distance, potential_a, potential_r = _transport(a.ordered, r.ordered)
    with_scale = potential_r - distance[:, None] * (r.ordered**2 - 1.0) / 2.0
    linear = a.variance_in_order(potential_a) + r.variance_in_order(with_scale)
    null, null_variance = _null_wasserstein(a, r)
    folded = np.minimum(1.0, null / np.maximum(distance, TINY)) ** 2
    return {
        "wasserstein": distance,
        "wasserstein_se": np.sqrt(folded * null_variance + (1.0 - folded) * linear),
        "wasserstein_null": null,
        "wasserstein_null_se": np.sqrt(null_variance),
    }


def _transport(a: Array, r: Array) -> tuple[Array, Array, Array]:
    """∫ |F_a − F_r| dx per latent, and for every draw of both sides the integral of the sign of F_a − F_r up to it.

    Both sides are `(latent, draw)` in ascending order, which a stable sort merges.
    """
    pooled = np.concatenate((a, r), axis=1)
    order = pooled.argsort(axis=1, kind="stable")
    width = np.diff(np.take_along_axis(pooled, order, axis=1), axis=1)
    gap = np.cumsum(np.where(order < a.shape[1], 1.0 / a.shape[1], -1.0 / r.shape[1]), axis=1)[:, :-1]
    rising = np.zeros_like(pooled)
    np.cumsum(np.sign(gap) * width, axis=1, out=rising[:, 1:])
    potential = np.empty_like(pooled)
    np.put_along_axis(potential, order, rising, axis=1)
    return (np.abs(gap) * width).sum(1), potential[:, : a.shape[1]], potential[:, a.shape[1] :]


def _null_wasserstein(a: Draws, r: Draws) -> tuple[Array, Array]:
    """Mean and variance of W for two samples of the reference posterior with these sizes and correlations.

    F_a − F_r is then a normal process: E|·| = √(2/π) sd at every point, and the covariance of two absolute values is
    that of a bivariate normal. The grid is dense in the tails.
    """
    edges = np.sin(np.linspace(0.0, np.pi / 2.0, _GRID + 1)) ** 2
    p = np.sin(np.pi / 2.0 * (np.arange(_GRID) + 0.5) / _GRID) ** 2
    quantiles = r.quantiles(np.concatenate((edges, p)))
    width = np.diff(quantiles[: _GRID + 1], axis=0).T
    covariance = _cdf_covariance(a, p, None) + _cdf_covariance(r, p, quantiles[_GRID + 1 :])
    sd = np.sqrt(np.diagonal(covariance, axis1=1, axis2=2))
    rho = np.clip(covariance / np.maximum(sd[:, :, None] * sd[:, None, :], TINY), -1.0, 1.0)
    folded = 2.0 / np.pi * (np.sqrt(1.0 - rho**2) + rho * np.arcsin(rho) - 1.0)
    noise = width * sd
    variance = np.einsum("lk,lkj,lj->l", noise, np.broadcast_to(folded, (len(noise), _GRID, _GRID)), noise)
    return np.sqrt(2.0 / np.pi) * noise.sum(1), variance


def _cdf_covariance(draws: Draws, p: Array, cuts: Array | None) -> Array:
    """Covariance `(latent, cut, cut)` of the empirical distribution function at its quantiles `cuts` `(cut, latent)`.

    It is that of a Brownian bridge for independent draws, the same for all latents, `(1, cut, cut)`, and is estimated
    from the scatter of blocks for MCMC.
    """
    if draws.independent:
        bridge = np.minimum.outer(p, p) - np.outer(p, p)
        return (bridge / draws.count)[None]
    at = draws.quantiles(p) if cuts is None else cuts
    below = np.stack([draws.blocks((draws.rows <= cut[:, None]).astype(np.float64)) for cut in at], 1)
    scatter = below - below.mean(2, keepdims=True)
    return scatter @ scatter.transpose(0, 2, 1) / (BLOCKS * (BLOCKS - 1))

"""Errors of the correlations of a guide, compared with those of the reference."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from calibrant.evaluation.statistics.draws import BLOCKS, TINY, Draws, cut_into_blocks

Array = npt.NDArray[np.float64]


def correlation_error(blocks: Array, latents: int) -> dict[str, Array]:
    """Root-mean-square difference of the correlation matrices' entries, without the contribution of sampling noise.

    The scatter of blocks (`correlation_blocks`) gives the covariance V of the mean difference d, also for MCMC. Then
    |d|² − tr V is unbiased for the squared difference |δ|², with variance 2 tr V² + 4 δᵀVδ (normal d). The traces are
    taken from the Gram matrix of the blocks: V itself, one row per pair of latents, is never formed.
    """
    mean, n = blocks.mean(0), BLOCKS - 1
    scatter = (blocks - mean) @ (blocks - mean).T / (n * BLOCKS * len(mean))
    noise = np.trace(scatter)  # tr V, here and below per pair of latents
    # Unbiased tr V² of a normal sample with n degrees of freedom.
    trace_square = n**2 / ((n - 1) * (n + 2)) * ((scatter**2).sum() - noise**2 / n)
    square = mean @ mean / len(mean) - noise
    along = (blocks @ mean).var(ddof=1) / (BLOCKS * len(mean) ** 2) - trace_square  # δᵀVδ
    square_se = np.sqrt(2.0 * trace_square + 4.0 * max(along, 0.0))
    error = np.sqrt(max(square, 0.0))
    return {
        "correlation_error": error,
        "correlation_error_se": np.sqrt(error**2 + square_se) - error,
        "correlation_mean_square": square,
        "correlation_mean_square_se": square_se,
        "correlation_null_se": np.sqrt(2.0 * trace_square),
        "correlation_noise": noise,
    } | _correlation_rows(*squared_errors(blocks), latents)


def squared_errors(blocks: Array) -> tuple[Array, Array]:
    """Squared error of every pair's correlation without its noise, and the variance of that noise, `(pair,)` each."""
    variance = blocks.var(0, ddof=1) / len(blocks)
    return blocks.mean(0) ** 2 - variance, variance


def pair_error(a: Draws, r: Draws) -> tuple[Array, Array]:
    """Error of the correlation of two latents with the variance of its noise, `(2,)`, and its blocks `(1, block)`."""
    blocks = correlation_blocks(a, r)
    return np.array([blocks.mean(), blocks.var(ddof=1) / len(blocks)]), blocks.T


def _correlation_rows(squares: Array, variance: Array, latents: int) -> dict[str, Array]:
    """Mean square and noise for each latent's row of the correlation matrix, in which one wrong pair stays visible."""
    upper = np.triu_indices(latents, 1)

    def row(pairs: Array) -> Array:
        total = sum(np.bincount(side, weights=pairs, minlength=latents) for side in upper)
        return np.asarray(total) / (latents - 1)

    return {"correlation_row_mean_square": row(squares), "correlation_row_noise": row(variance)}


def cross_blocks(a: Draws, r: Draws, shared_a: Draws, shared_r: Draws) -> Array:
    """Difference of the correlations of local with shared latents from each block of draws, `(pair, block)`."""
    latents, shared = a.values.shape[-1], shared_a.values.shape[-1]
    sides = [np.concatenate((own.values, other.values), -1) for own, other in ((a, shared_a), (r, shared_r))]
    one, other = np.triu_indices(latents + shared, 1)
    crosses = (one < latents) & (other >= latents)
    return (_linearised(sides[0]) - _linearised(sides[1])).T[crosses]


def rows_of(blocks: Array, latents: int) -> Array:
    """The blocks `(block, pair)` sorted into rows of the correlation matrix, `(latent, latent, block)`."""
    upper = np.triu_indices(latents, 1)
    found = np.zeros((latents, latents, len(blocks)))
    found[upper] = blocks.T
    found[upper[::-1]] = blocks.T
    return found


def correlation_blocks(a: Draws, r: Draws) -> Array:
    """Difference of the correlations of every pair of latents from each block of draws, `(block, pair)`."""
    return _linearised(a.values) - _linearised(r.values)


def _linearised(x: Array) -> Array:
    """Correlation of every pair of latents from each block, `(block, pair)`, linearised so that blocks are unbiased."""
    u = cut_into_blocks(x.reshape(-1, x.shape[-1]))
    u = (u - u.mean((0, 1))) / np.maximum(u.std((0, 1)), TINY)
    products = u.transpose(0, 2, 1) @ u / u.shape[1]
    squares = np.diagonal(products, axis1=1, axis2=2)
    rho = products.mean(0)
    upper = np.triu_indices(x.shape[-1], 1)
    half_sum = (squares[:, upper[0]] + squares[:, upper[1]]) / 2.0
    return products[:, upper[0], upper[1]] - rho[upper] * (half_sum - 1.0)


CORRELATION_ROWS = ("correlation_row_mean_square", "correlation_row_noise")
PER_DATUM = (
    "correlation_error",
    "correlation_error_se",
    "correlation_mean_square",
    "correlation_mean_square_se",
    "correlation_null_se",
    "correlation_noise",
)

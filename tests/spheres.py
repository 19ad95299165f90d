"""Integrals over circles and spheres by quadrature, with SciPy's Bessel functions: independent of the package."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
from scipy.special import gammaln, ive

Array = npt.NDArray[np.float64]


def log_c(dimension: int, concentration: npt.ArrayLike) -> Array:
    """log of the constant C(κ) of a von Mises–Fisher density C(κ) exp(κ cosine) on the unit sphere of ℝᵐ."""
    kappa, nu = np.asarray(concentration, np.float64), dimension / 2 - 1
    safe = np.maximum(kappa, 1e-300)
    inside = nu * np.log(safe) - dimension / 2 * np.log(2 * np.pi) - np.log(ive(nu, safe)) - safe
    return np.where(kappa > 0, inside, gammaln(dimension / 2) - np.log(2) - dimension / 2 * np.log(np.pi))


def nodes(dimension: int, count: int) -> tuple[Array, Array]:
    """Points `(node, m)` and weights `(node,)` of a quadrature over the circle or the sphere.

    `count` angles on the circle; on the sphere, so many around the axis, and half as many heights.
    """
    angle = 2 * np.pi * np.arange(count) / count
    if dimension == 2:
        return np.stack([np.cos(angle), np.sin(angle)], -1), np.full(count, 2 * np.pi / count)
    assert dimension == 3
    height, weight = np.polynomial.legendre.leggauss(count // 2)
    radius = np.sqrt(1 - height**2)
    points = [radius[:, None] * np.cos(angle), radius[:, None] * np.sin(angle), height[:, None] + 0 * angle]
    return np.stack(points, -1).reshape(-1, 3), (weight[:, None] * np.full(count, 2 * np.pi / count)).reshape(-1)


def masses(direction: npt.ArrayLike, concentration: float, points: Array, weights: Array) -> Array:
    """Probabilities of the nodes under a von Mises–Fisher distribution, `(node,)`."""
    mu = np.asarray(direction, np.float64)
    return weights * np.exp(log_c(len(mu), concentration) + concentration * points @ mu)


def normal_masses(mean: npt.ArrayLike, factor: Array, count: int) -> tuple[Array, Array]:
    """Points `(node, m)` and probabilities of a Normal with covariance `factor @ factor.T`, by Gauss–Hermite."""
    at, weight = np.polynomial.hermite_e.hermegauss(count)
    size = factor.shape[0]
    grid = np.stack(np.meshgrid(*[at] * size, indexing="ij"), -1).reshape(-1, size)
    every = np.prod(np.stack(np.meshgrid(*[weight] * size, indexing="ij"), -1).reshape(-1, size), -1)
    return np.asarray(mean) + grid @ factor.T, every / every.sum()


def softmax(logits: Array) -> Array:
    """Probabilities `(…, classes)`."""
    shifted = np.exp(logits - logits.max(-1, keepdims=True))
    return shifted / shifted.sum(-1, keepdims=True)

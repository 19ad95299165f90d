"""The probability that two latent directions match, when both have von Mises–Fisher distributions: exact, as a series.

Given two points of the sphere, a match has probability g(t) = σ(k t + b), where t is their cosine. On the sphere of
ℝᵐ, any function of a cosine is a series g(t) = Σ g_l P_l(t) of Gegenbauer polynomials with P_l(1) = 1, and averaging
over a von Mises–Fisher distribution multiplies P_l by a_l(κ) = I_{m/2−1+l}(κ) / I_{m/2−1}(κ) (Funk and Hecke). So

    E g(z₁·z₂) = Σ_l g_l a_l(κ₁) a_l(κ₂) P_l(μ₁·μ₂).

All a_l and |P_l| are 1 or less: what is cut off is less than the sum of the |g_l| that are left out.
"""

from __future__ import annotations

from functools import cache
from math import comb
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

from calibrant.distributions.directional import log_normalizer

_CUT = 1e-7  # of the terms that are left out, in absolute value, together
_MOST, _NODES = 300, 600  # terms, and nodes of the quadrature over the cosine
_BEYOND = 24  # orders above the last one, from which ratios of Bessel functions are computed downwards
Number = TypeVar("Number", Tensor, np.ndarray)


@cache
def match_constant(dimension: int, slope: float) -> float:
    """b = log C(k) − log C(0), with which a match has the odds of a von Mises–Fisher density to a uniform one.

    It is minus the log of E exp(k zᵀz′) over directions z′ that are uniform on the sphere of ℝᵐ.

    Args:
        dimension: m, 2 or more.
        slope: k ≥ 0.
    """
    largest, least = log_normalizer(dimension, torch.tensor([slope, 0.0], dtype=torch.float64)).tolist()
    return float(largest - least)


def match_probability(
    cosine: Tensor,
    concentration: Tensor,
    other: Tensor,
    dimension: int,
    slope: float = 20.0,
    offset: float | None = None,
    largest: float = 256.0,
) -> Tensor:
    """E σ(k z₁·z₂ + b) for z₁ ~ vMF(μ₁, κ₁) and z₂ ~ vMF(μ₂, κ₂): the marginal likelihood of a matching pair.

    Args:
        cosine: μ₁·μ₂, of any shape; all three tensors broadcast, and the result has derivatives.
        concentration: κ₁ > 0.
        other: κ₂ > 0.
        dimension: m, the dimension of the space around the sphere, 2 or more.
        slope: k.
        offset: b; None for `match_constant(dimension, slope)`, which MCInfoNCE takes.
        largest: the largest concentration for which the result is exact to 1e-6; more take more terms.
    """
    offset = match_constant(dimension, slope) if offset is None else offset
    weights = _coefficients(dimension, float(slope), float(offset), float(largest))
    first, second = (_ratios(dimension, kappa, len(weights)) for kappa in (concentration, other))
    total, before, here = torch.zeros_like(cosine), torch.ones_like(cosine), cosine
    shrunk, double = torch.ones_like(concentration), torch.ones_like(other)
    for order, weight in enumerate(weights):
        if order:
            shrunk, double = shrunk * first[order - 1], double * second[order - 1]
        total = total + weight * (shrunk * double) * before
        before, here = here, _next(dimension, order + 1, cosine, here, before)
    return total.clamp(1e-7, 1 - 1e-7)


def _next(dimension: int, order: int, t: Number, here: Number, before: Number) -> Number:
    """P_{l+1}, from P_l (`here`) and P_{l−1}, with l = `order`."""
    return ((2 * order + dimension - 2) * t * here - order * before) / (order + dimension - 2)


def _ratios(dimension: int, concentration: Number, count: int) -> list[Number]:
    """I_{ν+l+1}(κ)/I_{ν+l}(κ), ν = m/2 − 1, for l = 0 … count − 1, by the recurrence from above, which is stable."""
    top = dimension / 2 - 1 + count + _BEYOND
    ratio = concentration / (top + 1 + (concentration**2 + (top + 1) ** 2) ** 0.5)
    found: list[Number] = []
    for step in range(count + _BEYOND):
        order = top - step
        ratio = concentration / (2 * order + concentration * ratio)
        if step >= _BEYOND:
            found.append(ratio)
    return found[::-1]


@cache
def _coefficients(dimension: int, slope: float, offset: float, largest: float) -> tuple[float, ...]:
    """The g_l, as many as count for concentrations up to `largest`."""
    nodes, measure = _uniform(dimension)
    measure = measure / (1 + np.exp(-slope * nodes - offset))
    shrinking = np.cumsum([2 * np.log(ratio) for ratio in _ratios(dimension, np.array(largest), _MOST)])
    found, sizes, before, here = [], [], np.ones_like(nodes), nodes
    for order in range(_MOST):
        found.append(float((measure * before).sum()) * _harmonics(dimension, order))
        sizes.append(abs(found[-1]) * (np.exp(shrinking[order - 1]) if order else 1.0))
        before, here = here, _next(dimension, order + 1, nodes, here, before)
    left_out = np.cumsum(sizes[::-1])[::-1]
    return tuple(found[: int((left_out > _CUT).sum())])


@cache
def _uniform(dimension: int) -> tuple[np.ndarray, np.ndarray]:
    """Nodes and weights of Gaussian quadrature for the cosine to a uniform direction."""
    from scipy.special import roots_jacobi

    nodes, weights = roots_jacobi(_NODES, (dimension - 3) / 2, (dimension - 3) / 2)
    return nodes, weights / weights.sum()


def _harmonics(dimension: int, order: int) -> float:
    """The number of independent spherical harmonics of an order."""
    if order == 0 or dimension == 2:
        return 2.0 if order else 1.0
    return (2 * order + dimension - 2) / order * comb(order + dimension - 3, order - 1)

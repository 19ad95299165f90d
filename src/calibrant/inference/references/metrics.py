"""The metric (inverse mass matrix) from draws and gradients of the log density.

For a Normal posterior, gradients are −Σ⁻¹ (q − μ), so that Cov(gradients) = Σ⁻¹ Cov(draws) Σ⁻¹ wherever the draws lie.
The M that solves M Cov(gradients) M = Cov(draws), which is the geometric mean of Cov(draws) and Cov(gradients)⁻¹, is
then Σ itself, from few draws that are not yet draws of the posterior. For other posteriors, M minimises the Fisher
divergence to a Normal (Seyboldt, Carlson & Carpenter 2026, arXiv 2603.18845); a diagonal M is sd(q) / sd(gradient).
"""

from __future__ import annotations

import torch
from torch import Tensor

_FEWEST = 10.0  # draws from which a metric is estimated
_FEWEST_PER_ENTRY = 2.0  # draws per dimension from which it is dense
_JITTER = 1e-10  # relative to the diagonal, so that rounding leaves covariances positive definite


def metric(count: Tensor, draws: Tensor, gradients: Tensor, before: Tensor) -> Tensor:
    """The inverse mass of lanes.

    Args:
        count: number of draws, `(n,)`.
        draws: variances of the draws `(n, d)`, or covariances `(n, d, d)`.
        gradients: those of the gradients at the draws.
        before: the current inverse mass, which stays where draws are too few or do not vary.

    Returns:
        As `before`. With fewer than 2 d draws, a dense metric is diagonal.
    """
    dense = before.dim() == 3
    spreads = (part.diagonal(dim1=-2, dim2=-1) if dense else part for part in (draws, gradients, before))
    own, slope, now = spreads
    diagonal = (own / slope).sqrt()
    known = (count >= _FEWEST)[:, None] & (own > 0) & (slope > 0) & diagonal.isfinite() & (diagonal > 0)
    diagonal = torch.where(known, diagonal, now)
    if not dense:
        return diagonal
    found = torch.where(known.all(-1)[:, None, None], torch.diag_embed(diagonal), before)
    enough = known.all(-1) & (count >= _FEWEST_PER_ENTRY * before.shape[-1])
    index = enough.nonzero()[:, 0]
    scale = diagonal[index].sqrt()
    both = scale[:, :, None] * scale[:, None, :]
    shape, right = _geometric_mean(draws[index] / both, gradients[index] * both)
    return found.index_copy(0, index[right], (shape * both)[right])


def _geometric_mean(first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
    """M with M · second · M = first for covariances `(n, d, d)`, and where it is positive definite, `(n,)`."""
    first, second = (part + _JITTER * torch.diag_embed(part.diagonal(dim1=-2, dim2=-1)) for part in (first, second))
    factor, failed = torch.linalg.cholesky_ex(second)
    eye = torch.eye(first.shape[-1], dtype=first.dtype, device=first.device).expand_as(first)
    factor = torch.where((failed > 0)[:, None, None], eye, factor)
    values, vectors = torch.linalg.eigh(factor.mT @ first @ factor)
    root = (vectors * values.clamp_min(0).sqrt()[:, None]) @ vectors.mT
    back = torch.linalg.solve_triangular(factor, eye, upper=False)
    mean = back.mT @ root @ back
    mean = 0.5 * (mean + mean.mT)
    right = (failed == 0) & (torch.linalg.cholesky_ex(mean)[1] == 0) & mean.isfinite().all((1, 2))
    return mean, right

"""The posterior of a representation when a second view of the same image is known, and whether it is better.

With the prior p(z | x) = vMF(μ, κ) of a pair of images and p(y = 1 | z, z′) = σ(k zᵀz′ + b), the posterior of z given
y = 1 is p(z | x) h(zᵀμ′), where h is the expectation of p(y = 1 | z, z′) over z′ ~ vMF(μ′, κ′). It depends on the
coordinates of z in the plane of μ and μ′ alone, so that it takes two integrals of two dimensions, which are computed
without draws: z = t μ + √(1 − t²)(ξ e + …), where t is the cosine of a von Mises–Fisher point, and ξ a coordinate of a
uniform point on the sphere of one dimension less.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
import xarray as xr
from numpy.polynomial import chebyshev
from scipy.fft import dct
from scipy.special import expit, logsumexp, roots_gegenbauer

from calibrant.distributions.directional import cosine_nodes, mean_cosine
from calibrant.distributions.matching import match_constant
from calibrant.errors import DataError, InferenceError
from calibrant.evaluation.representations.given import finite_matrix
from calibrant.evaluation.representations.inputs import image_numbers
from calibrant.evaluation.statistics.arrays import Array, Given
from calibrant.evaluation.statistics.settings import real
from calibrant.progress import Progress, reporting

_LEAST = 500.0  # largest size of b, so that probabilities do not vanish in float64
_BLOCK = 1 << 21  # numbers that are computed together
_PARALLEL = 1e-12  # sines below it leave no plane
_MOST = 100.0  # largest k, for which nodes are dense enough
_TINY = 1e-300  # least weight of a node whose logarithm is taken
_NEWTON = 30  # steps towards a concentration, at most
_DIMS = {
    "direction": ("data", "feature"),
    **dict.fromkeys(("resultant", "concentration", "match", "information", "efficiency"), ("data",)),
}


def second_view_posterior(
    directions: Given,
    concentration: Given,
    other_directions: Given,
    other_concentration: Given,
    k: float,
    bias: float | None = None,
    progress: Progress | bool = True,
) -> xr.Dataset:
    """The posterior of each image's embedding, given that a second image is a view of the same object.

    The program is that of MCInfoNCE's generative model (arXiv 2302.02865): z ~ vMF(μ(x), κ(x)), z′ ~ vMF(μ(x′), κ(x′)),
    y ~ Bernoulli(σ(k zᵀz′ + b)), with y = 1 observed. The posterior is integrated numerically, without draws, so that
    there are no importance weights that could degenerate.

    Args:
        directions: μ of the first views, `(data, feature)`; they are normalised.
        concentration: κ ≥ 0 of the first views, `(data,)`, of the posterior around these directions. After a training
            with `trunk="none"`, κ belong to the embedding of the program and not to the features that `embed` returns:
            take `trunk="linear"`, or directions of `program.embed`.
        other_directions: μ′ of the second views, `(data, feature)`.
        other_concentration: κ′ ≥ 0 of the second views, `(data,)`.
        k: concentration of the pair likelihood, above 0 and at most 100.
        bias: b; None for log C(k) − log C(0), with which y tells whether z′ was drawn from vMF(z, k) or uniformly.
        progress: whether bars are shown in a terminal or notebook, or a function (stage, done, total, text).

    Returns:
        Over `data`: `direction` (data, feature), the unit vector along the posterior mean; `resultant`, the length of
        that mean; `concentration`, the κ of a von Mises–Fisher distribution with that length (the posterior is none);
        `match`, the probability of y = 1; `information`, the KL divergence of the posterior from the prior in nats;
        `efficiency`, the effective share of draws of the prior that importance weights would leave.

    Raises:
        DataError: for directions or concentrations that cannot be used.
        InferenceError: for a k or a bias outside its range.
    """
    progress = reporting(progress)
    first, second = _Views.of(directions, concentration), _Views.of(other_directions, other_concentration)
    if first.directions.shape != second.directions.shape:
        raise DataError(f"views have shapes {first.directions.shape} and {second.directions.shape}: give pairs")
    dimension = first.directions.shape[1]
    k = real(k, "k")
    if not 0 < k <= _MOST:
        raise InferenceError(f"k={k}: give the concentration of the pair likelihood, above 0 and at most {_MOST:.0f}")
    if bias is None:
        bias = match_constant(dimension, k)
    if not abs(bias := real(bias, "bias")) <= _LEAST:
        raise InferenceError(f"bias={bias}: give one between −{_LEAST:.0f} and {_LEAST:.0f}")
    likelihood = _Likelihood.of(dimension, k, bias)
    rows = max(1, _BLOCK // (100 * len(likelihood.around)))
    found = []
    for start in range(0, len(first.concentration), rows):
        block = slice(start, start + rows)
        found.append(_posterior(first.some(block), second.some(block), likelihood))
        progress("second views", min(start + rows, len(first.concentration)), len(first.concentration))
    return xr.Dataset({name: (dims, np.concatenate([part[name] for part in found])) for name, dims in _DIMS.items()})


class _Views(NamedTuple):
    """Mean directions `(data, feature)` of length 1, and concentrations `(data,)`."""

    directions: Array
    concentration: Array

    @classmethod
    def of(cls, directions: Given, concentration: Given) -> _Views:
        rows = finite_matrix(directions, "directions").astype(np.float64)
        lengths = np.linalg.norm(rows, axis=1, keepdims=True)
        kappa = image_numbers(concentration, len(rows), "concentration")
        if (lengths == 0).any() or rows.shape[1] < 2 or not (np.isfinite(kappa) & (kappa >= 0)).all():
            raise DataError("give directions of two features or more, none of them zero, and finite κ ≥ 0")
        return cls(rows / lengths, kappa)

    def some(self, block: slice) -> _Views:
        return _Views(self.directions[block], self.concentration[block])


class _Likelihood(NamedTuple):
    """σ(k zᵀz′ + b), with nodes for a coordinate of a uniform point on the sphere of one dimension less."""

    dimension: int
    k: float
    bias: float
    around: Array
    around_weights: Array

    @classmethod
    def of(cls, dimension: int, k: float, bias: float) -> _Likelihood:
        return cls(dimension, k, bias, *_around(dimension, int(16 + k)))

    def coefficients(self, kappas: Array) -> Array:
        """log h as a Chebyshev series in the cosine to μ′, `(degree, data)`, for κ′ `(data,)`."""
        count = int(24 + 2 * self.k)
        cosines = np.cos(np.pi * (np.arange(count) + 0.5) / count)
        sines = np.sqrt(1 - cosines**2)
        along, weights = (part.numpy() for part in cosine_nodes(self.dimension, torch.from_numpy(kappas)))
        across = np.sqrt((1 - along**2).clip(0))[:, :, None] * self.around
        log_h = np.empty((count, len(kappas)))
        for place, (cosine, sine) in enumerate(zip(cosines, sines, strict=True)):
            likely = expit(self.k * (cosine * along[:, :, None] + sine * across) + self.bias)
            log_h[place] = np.log((weights * (likely @ self.around_weights)).sum(1))
        found = dct(log_h, axis=0) / count
        found[0] /= 2
        return np.asarray(found)


def _around(dimension: int, count: int) -> tuple[Array, Array]:
    """Nodes and weights for a coordinate of a uniform point on the unit sphere of ℝ^(dimension − 1)."""
    if dimension == 2:
        return np.array([-1.0, 1.0]), np.array([0.5, 0.5])
    nodes, weights = roots_gegenbauer(count, (dimension - 3) / 2)
    return nodes, weights / weights.sum()


def _posterior(first: _Views, second: _Views, likelihood: _Likelihood) -> dict[str, Array]:
    """The posterior of a block of data; z = t μ + √(1 − t²)(ξ e + …), with e in the plane of μ and μ′."""
    cosine = (first.directions * second.directions).sum(1)
    aside = second.directions - cosine[:, None] * first.directions
    sine = np.linalg.norm(aside, axis=1)
    aside = np.divide(aside, sine[:, None], out=np.zeros_like(aside), where=sine[:, None] > _PARALLEL)
    dimension = first.directions.shape[1]
    t, weights = (part.numpy()[:, :, None] for part in cosine_nodes(dimension, torch.from_numpy(first.concentration)))
    across = np.sqrt((1 - t**2).clip(0)) * likelihood.around
    there = (t * cosine[:, None, None] + across * sine[:, None, None]).clip(-1, 1)
    series = likelihood.coefficients(second.concentration)[:, :, None, None]
    log_h = np.asarray(chebyshev.chebval(there, series, tensor=False))
    log_prior = np.log(np.maximum(weights * likelihood.around_weights, _TINY))
    match = logsumexp(log_prior + log_h, axis=(1, 2))
    posterior = np.exp(log_prior + log_h - match[:, None, None])
    along, beside = ((posterior * part).sum((1, 2)) for part in (np.broadcast_to(t, posterior.shape), across))
    resultant = np.hypot(along, beside)
    mean = along[:, None] * first.directions + beside[:, None] * aside
    return {
        "direction": mean / np.linalg.norm(mean, axis=1, keepdims=True),
        "resultant": resultant,
        "concentration": _concentration(dimension, resultant),
        "match": np.exp(match),
        "information": (posterior * log_h).sum((1, 2)) - match,
        "efficiency": np.exp(2 * match - logsumexp(log_prior + 2 * log_h, axis=(1, 2))),
    }


def _concentration(dimension: int, resultant: Array) -> Array:
    """κ with the mean cosine that is given, by Newton's method from the start of Banerjee et al. (2005)."""
    length = torch.from_numpy(resultant)
    kappa = length * (dimension - length**2) / (1 - length**2)
    for _ in range(_NEWTON):
        found = mean_cosine(dimension, kappa)
        slope = 1 - found**2 - (dimension - 1) * found / kappa.clamp_min(1e-9)
        kappa = (kappa - (found - length) / slope.clamp_min(1e-12)).clamp_min(kappa / 2)
    return kappa.numpy()

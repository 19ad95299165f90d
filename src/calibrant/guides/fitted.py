"""A multivariate t for each of some known data, fitted to weighted draws: a proposal with heavy tails."""

from __future__ import annotations

from collections.abc import Mapping
from math import prod
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from pyro.nn import PyroModule
from torch import Tensor
from torch.distributions.transforms import ReshapeTransform

from calibrant.guides.known_data import KnownData
from calibrant.program.contract import PLATE, Values
from calibrant.program.supports import from_line

FREEDOM = 5.0  # degrees of freedom: tails that are heavier than those of most posteriors, with finite variances


class FittedGuide(PyroModule):
    """q(z | x) of known data: a multivariate t over all latents in unconstrained space, one for each datum.

    Sites are drawn one after another from the conditionals of that t, so that draws and densities are those of a guide.

    Args:
        values: observations and covariates of the known data.
        supports: latent → support, in the order in which they are drawn.
        draws: latent → draws in unconstrained space, `(data, draw, *event)`.
        weights: weights of the draws, which sum to one, `(data, draw)`.
    """

    mean: Tensor
    root: Tensor

    def __init__(self, values: Values, supports: Mapping[str, Any], draws: Values, weights: Tensor) -> None:
        super().__init__()
        self.known = KnownData(values)
        self.supports = dict(supports)
        self.shapes = {name: tuple(draws[name].shape[2:]) for name in supports}
        flat = torch.cat([draws[name].reshape(*draws[name].shape[:2], -1) for name in supports], 2).double()
        mean, root = _fitted(flat, weights.double())
        place = self.known(values)
        self.register_buffer("mean", torch.empty(len(self.known), mean.shape[1], dtype=mean.dtype))
        self.register_buffer("root", torch.empty(len(self.known), *root.shape[1:], dtype=root.dtype))
        self.mean[place], self.root[place] = mean, root

    def forward(self, observed: Mapping[str, Tensor], size: int, **covariates: Tensor) -> None:
        rows = self.known({**observed, **covariates})
        mean, root, before, start = self.mean[rows], self.root[rows], self.mean.new_zeros(size, 0), 0
        with pyro.plate(PLATE, size):
            for name, shape in self.shapes.items():
                here = slice(start, start + prod(shape))
                own, past = root[:, here, here], root[:, here, :start]
                centre = mean[:, here] + (past @ before[..., None])[..., 0]
                freedom = FREEDOM + start
                spread = ((FREEDOM + before.square().sum(1)) / freedom).sqrt()
                line = dist.MultivariateStudentT(
                    torch.full((size,), freedom, dtype=mean.dtype), centre, spread[:, None, None] * own
                )
                to_support = from_line(self.supports[name])
                into = [ReshapeTransform(torch.Size([prod(shape)]), torch.Size(shape)), to_support]
                value = pyro.sample(name, dist.TransformedDistribution(line, into))
                found = to_support.inv(value).reshape(size, -1)
                white = torch.linalg.solve_triangular(own, (found - centre)[..., None], upper=False)[..., 0]
                before, start = torch.cat([before, white], 1), here.stop


def _fitted(draws: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """Mean `(data, k)` and root of the covariance `(data, k, k)` of weighted draws `(data, draw, k)`.

    Where few draws have weight, the covariance is drawn towards that of all draws, as if there were k of them more.
    """
    mean = (weights[..., None] * draws).sum(1)
    centred, count = draws - mean[:, None], draws.shape[2]
    weighted = torch.einsum("nd,ndi,ndj->nij", weights, centred, centred)
    plain = draws - draws.mean(1, keepdim=True)
    every = torch.einsum("ndi,ndj->nij", plain, plain) / draws.shape[1]
    effective = (1 / weights.square().sum(1))[:, None, None]
    covariance = (effective * weighted + count * every) / (effective + count)
    jitter = 1e-10 * covariance.diagonal(dim1=1, dim2=2).mean(1)[:, None, None]
    return mean, torch.linalg.cholesky(covariance + jitter * torch.eye(count, dtype=draws.dtype))

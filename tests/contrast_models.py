"""What the tests of the contrast experiment share: models, images, and guides that are exact, flat or wrong."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import pyro
import pyro.distributions as dist
import torch
import xarray as xr
from pyro.distributions import TorchDistribution
from pyro.nn import PyroModule
from torch import Tensor
from torch.distributions import constraints

import calibrant as cal
from calibrant.evaluation import contrast_experiment, contrast_verdicts

SHAPE, LATENTS, LEVELS, FEW = (1, 4, 4), 5, [0.1, 0.3, 1.0, 3.0, 10.0], [0.1, 1.0, 10.0]


def model(name: str, **arguments: Any) -> PyroModule:
    torch.manual_seed(0)
    if name == "ea-vae":  # small scales likely, so that a blank image leaves the latents at their prior
        arguments = {"scale_prior": {"name": "lognormal", "loc": -1.5, "scale": 1.5}, **arguments}
    return cal.models.create(name, shape=list(SHAPE), latents=LATENTS, **arguments).eval()


def images(count: int = 12, seed: int = 1) -> dict[str, Tensor]:
    """Images of very different contrast, none of them blank: what the decoders of `model` make, with a little noise."""
    generator = torch.Generator().manual_seed(seed)
    strength = torch.rand(count, 1, generator=generator) + 0.5
    x = torch.randn(count, LATENTS, generator=generator) @ model("vae").decoder.weight.detach().T
    x = strength * x + 0.1 * torch.randn(count, x.shape[1], generator=generator)
    return {"x": x.reshape(count, *SHAPE)}


class GridScale(TorchDistribution):
    """A positive variable whose logarithm has a piecewise constant density: `weights` (size, cells) on one grid."""

    arg_constraints: Mapping[str, constraints.Constraint] = {}
    support = constraints.positive
    has_rsample = False

    def __init__(self, grid: Tensor, log_weights: Tensor) -> None:
        self.grid, self.width = grid, grid[1] - grid[0]
        self.cells = torch.distributions.Categorical(logits=log_weights, validate_args=False)
        super().__init__(log_weights.shape[:1], validate_args=False)

    def sample(self, sample_shape: Any = ()) -> Tensor:
        cell = self.cells.sample(sample_shape)
        return (self.grid[cell] + self.width * (torch.rand(cell.shape) - 0.5)).exp()

    def log_prob(self, value: Tensor) -> Tensor:
        cell = ((value.log() - self.grid[0]) / self.width).round().long().clamp(0, len(self.grid) - 1)
        return self.cells.log_prob(cell) - self.width.log() - value.log()


class ExactGuide(PyroModule):
    """The exact posterior of a linear model by dense algebra of its own, with the scale on a fine grid.

    `widen` multiplies the sd of z: a planted defect.
    """

    def __init__(self, target: PyroModule, widen: float = 1.0) -> None:
        super().__init__()
        self.target, self.widen = target, widen
        self.register_buffer("grid", torch.linspace(-9.0, 6.0, 600))

    def forward(self, observed: Mapping[str, Tensor], size: int) -> None:
        images, row = observed["x"].flatten(1).unique(dim=0, return_inverse=True)
        loading, noise = self.target.decoder.weight, self.target.likelihood.scale
        error = images - self.target.decoder.bias
        with pyro.plate("data", size):
            scale = torch.ones(size)
            if hasattr(self.target, "prior_of_scale"):
                scale = pyro.sample("scale", GridScale(self.grid, self.log_weights(error)[row]))
            gain = (loading.T @ loading)[None] * (scale / noise)[:, None, None] ** 2
            covariance = torch.linalg.inv(torch.eye(loading.shape[1]) + gain)
            mean = (scale / noise**2)[:, None] * torch.einsum("nij,nj->ni", covariance, (error @ loading)[row])
            root = self.widen * torch.linalg.cholesky(covariance)
            pyro.sample("z", dist.MultivariateNormal(mean, scale_tril=root))

    def log_weights(self, error: Tensor) -> Tensor:
        """log p(log s) p(x | s) of the unique images on the grid, `(images, cells)`."""
        scale, loading = self.grid.exp(), self.target.decoder.weight
        values, vectors = torch.linalg.eigh(loading @ loading.T)
        variance = scale[:, None] ** 2 * values.clamp_min(0) + self.target.likelihood.scale**2
        power = (error @ vectors)[:, None] ** 2 / variance
        return (
            -0.5 * (power.sum(-1) + variance.log().sum(-1)) + self.target.prior_of_scale().log_prob(scale) + self.grid
        )


class PlainGuide(PyroModule):
    """Normal z around zero with an sd that may depend on the image's contrast, and a scale that does not."""

    def __init__(self, sd: Callable[[Tensor], Tensor], scale: bool) -> None:
        super().__init__()
        self.sd, self.scale = sd, scale

    def forward(self, observed: Mapping[str, Tensor], size: int) -> None:
        width = self.sd(observed["x"].flatten(1).std(1))[:, None].expand(size, LATENTS)
        with pyro.plate("data", size):
            if self.scale:
                pyro.sample("scale", dist.LogNormal(torch.zeros(size), 0.3))
            pyro.sample("z", dist.Normal(torch.zeros_like(width), width).to_event(1))


def flat(width: float) -> Callable[[Tensor], Tensor]:
    return lambda strength: torch.full_like(strength, width)


def experiment(target: PyroModule, guide: PyroModule, **options: Any) -> xr.Dataset:
    return contrast_experiment(target, guide, images(), **{"levels": FEW, "chains": 2, **options})


def statuses(result: xr.Dataset) -> dict[tuple[str, str], str]:
    return {(v.site, v.quantity): v.status for v in contrast_verdicts(result)}


def shown(strength: float) -> Tensor:
    """The images of `images()` at a contrast, as the experiment should show them."""
    x = images()["x"].double()
    centred = x - x.mean((1, 2, 3), keepdim=True)
    return strength * centred / centred.square().mean((1, 2, 3), keepdim=True).sqrt()

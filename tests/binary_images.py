"""A Bernoulli EA-VAE with two latents, its posterior by quadrature, and guides that are near it or far from it."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import numpy.typing as npt
import pyro
import pyro.distributions as dist
import torch
from pyro.nn import PyroModule
from torch import Tensor
from torch.nn.functional import softplus

import calibrant as cal

SHAPE = (1, 4, 4)


def binary_model() -> PyroModule:
    """The scale multiplies the logits: s = 0 is mid-grey."""
    torch.manual_seed(3)
    return cal.models.create("ea-vae", shape=SHAPE, latents=2, likelihood="bernoulli", multiplies="logits").eval()


def binary_images(count: int, seed: int = 1) -> dict[str, Tensor]:
    return {"x": cal.program.sample_prior(binary_model(), count, seed=seed)["x"].detach()}


class Grid:
    """The joint posterior of images on a grid over z and log s, where all of it lies."""

    def __init__(self, target: PyroModule, nodes: int = 41) -> None:
        z, log_s = torch.linspace(-5.0, 5.0, nodes), torch.linspace(-6.0, 5.0, nodes)
        one, two, log_s = (part.reshape(-1) for part in torch.meshgrid(z, z, log_s, indexing="ij"))
        self.values = torch.stack([one, two, log_s], 1).double()
        prior = -0.5 * self.values.square().sum(1)
        with torch.no_grad():
            logits = log_s[:, None].exp() * target.decoder(torch.stack([one, two], 1)).flatten(1)
        self.logits, self.prior = logits.double(), prior - prior.logsumexp(0)

    def log_weights(self, x: Tensor) -> Tensor:
        """Log joint probabilities of images and nodes, `(image, node)`; their sums are the evidence."""
        return x.flatten(1).double() @ self.logits.T - softplus(self.logits).sum(1) + self.prior

    def moments(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and sd of z and log s, `(image, 3)`."""
        weights = self.log_weights(x).softmax(1)
        mean = weights @ self.values
        return mean, (weights @ self.values.square() - mean.square()).clamp_min(1e-6).sqrt()

    def of_scale(self, x: Tensor) -> npt.NDArray[np.float64]:
        """Standard deviation over mean of s, `(image,)`."""
        weights, s = self.log_weights(x).softmax(1), self.values[:, 2].exp()
        mean = weights @ s
        return ((weights @ s.square() - mean.square()).sqrt() / mean).numpy()


class GridGuide(PyroModule):
    """Independent Normals for z and log s with the moments of the posterior, the sds multiplied by `widen`."""

    def __init__(self, target: PyroModule, widen: float = 1.2) -> None:
        super().__init__()
        self.grid, self.widen = Grid(target), widen

    def forward(self, observed: Mapping[str, Tensor], size: int) -> None:
        x = observed["x"]
        images, row = x.flatten(1).unique(dim=0, return_inverse=True)
        mean, sd = (part.to(x.dtype)[row] for part in self.grid.moments(images))
        with pyro.plate("data", size):
            pyro.sample("scale", dist.LogNormal(mean[:, 2], self.widen * sd[:, 2]))
            pyro.sample("z", dist.Normal(mean[:, :2], self.widen * sd[:, :2]).to_event(1))

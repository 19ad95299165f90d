"""Normal noise whose scale is the error of the training set."""

from __future__ import annotations

import pyro.distributions as dist
import torch
from torch import Tensor

from calibrant.models.parts.likelihoods.protocol import Likelihood, Shape
from calibrant.models.parts.likelihoods.registry import register_likelihood
from calibrant.models.parts.likelihoods.scales import BEFORE_DATA
from calibrant.registries import Case


@register_likelihood(
    "gaussian-optimal",
    density_of="real numbers",
    equations="x ~ Normal(location, σ²), σ² the mean squared error of the training set",
    paper="Rybkin, Daniilidis & Levine 2021, arXiv 2006.13202, equation 8",
    cases=(Case({}, {"x": (1,)}), Case({}, {"x": (1, 4, 4)}, name="image")),
)
class GaussianOptimal(Likelihood):
    """Normal noise around the decoder's output, with one scale that is optimal rather than learned.

    In `train()`, the density of a minibatch is computed with its own optimal scale: the root mean square of the errors
    of all its entries. It is no density of single data then, and is refused outside of trainings. In `eval()`, the mode
    of a new one, it is a Normal whose scale is a buffer. `fit` sets it to the standard deviation of the training data
    at first, and to the root mean squared error of the whole training set, with draws of the guide, before every
    held-out ELBO: all values that are reported, and all draws, use this scale.

    With the objectives "iwae" and "dreg" it cannot be trained, since these weight single draws. Use "gaussian", whose
    scale is learned.
    """

    scale: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("scale", torch.tensor(BEFORE_DATA))
        self.is_started = False
        self.eval()

    def outputs(self, shape: Shape) -> dict[str, Shape]:
        return {"location": shape}

    def marginals(self, output: Tensor) -> dist.TorchDistribution:
        return BatchNormal(output, self.scale) if self.training else dist.Normal(output, self.scale)

    def noise_sd(self, output: Tensor) -> Tensor:
        return self.scale

    def start_noise(self, mean_squares: Tensor) -> None:
        self.settle_noise(mean_squares)

    def settle_noise(self, mean_squares: Tensor) -> None:
        self.scale.copy_(mean_squares.mean().clamp_min(torch.finfo(self.scale.dtype).tiny).sqrt())
        self.is_started = True


class BatchNormal(dist.Normal):
    """Normal entries, with the density under the scale that is optimal for all values that are given together."""

    def log_prob(self, value: Tensor) -> Tensor:
        error = (value - self.loc).square().mean()
        scale = error.clamp_min(torch.finfo(error.dtype).tiny).sqrt()
        return dist.Normal(self.loc, scale).log_prob(value)

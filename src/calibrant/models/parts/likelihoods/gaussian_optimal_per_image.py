"""Normal noise with the scale that is optimal for each image: a training loss."""

from __future__ import annotations

from math import log, pi, prod
from typing import Any

import pyro.distributions as dist
import torch
from torch import Tensor
from torch.distributions import constraints

from calibrant.models.parts.likelihoods.protocol import Likelihood, Shape
from calibrant.models.parts.likelihoods.registry import register_likelihood
from calibrant.registries import Case


@register_likelihood(
    "gaussian-optimal-per-image",
    density_of="no density: a training loss for real numbers",
    equations="−D/2·(ln 2πe σ²), σ² the mean squared error of the D entries of x",
    paper="Rybkin, Daniilidis & Levine 2021, arXiv 2006.13202, section 3.3",
    cases=(Case({}, {"x": (1,)}), Case({}, {"x": (1, 4, 4)}, name="image")),
)
class GaussianOptimalPerImage(Likelihood):
    """The log density of Normal noise at the scale that is optimal for the observation itself: a training loss.

    It is proportional to ‖x − location‖^(−D), whose mass is infinite. A model can be trained with it, but has no draws
    of data, no posterior and no evidence. With densities: "student-t-radius", in which the scale of each image has an
    Inverse-Gamma prior, or a scale of each image as a latent of the program.
    """

    is_density = False

    def outputs(self, shape: Shape) -> dict[str, Shape]:
        return {"location": shape}

    def forward(self, output: Tensor) -> dist.TorchDistribution:
        return ImageNormal(output, output.dim() - 1)


class ImageNormal(dist.TorchDistribution):
    """Normal entries around a location `(*batch, *event)`, at the scale that is optimal for each row of values.

    Its `sample` returns the location, so that a program can run; nothing is simulated with it.
    """

    arg_constraints = {"loc": constraints.real}
    is_density = False
    instead = (
        "in place of 'gaussian-optimal-per-image', use 'student-t-radius', or draw the noise scale of each image as a "
        "latent, as the model 'sigma-image-vae' does"
    )

    def __init__(self, loc: Tensor, event_dim: int, validate_args: bool | None = None) -> None:
        self.loc = loc
        super().__init__(loc.shape[:-event_dim], loc.shape[-event_dim:], validate_args=validate_args)

    @constraints.dependent_property(is_discrete=False)
    def support(self) -> Any:
        return constraints.independent(constraints.real, len(self.event_shape))

    @property
    def mean(self) -> Tensor:
        return self.loc

    def expand(self, batch_shape: Any, _instance: Any = None) -> ImageNormal:
        return ImageNormal(self.loc.expand(*batch_shape, *self.event_shape), self.event_dim)

    def sample(self, sample_shape: Any = ()) -> Tensor:
        return self.loc.detach().expand(*sample_shape, *self.loc.shape).clone()

    def log_prob(self, value: Tensor) -> Tensor:
        error = (value - self.loc).square().flatten(-self.event_dim).mean(-1)
        error = error.clamp_min(torch.finfo(error.dtype).tiny)
        return -0.5 * prod(self.event_shape) * (error.log() + log(2 * pi) + 1)

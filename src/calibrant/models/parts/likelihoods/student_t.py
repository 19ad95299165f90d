"""Student-t noise whose parameters all come from the decoder."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pyro.distributions as dist
import torch
from scipy.special import stdtr, stdtrit
from torch import Tensor

from calibrant.guides.families.densities import degrees_of_freedom
from calibrant.models.parts.likelihoods.protocol import Likelihood, Shape
from calibrant.models.parts.likelihoods.registry import register_likelihood
from calibrant.models.parts.likelihoods.scales import bounded_scale
from calibrant.registries import Case


@register_likelihood(
    "student-t",
    density_of="real numbers",
    equations="x ~ StudentT(ν, location, exp(log_scale)), all from the decoder, 1 < ν < 100",
    paper="Takahashi et al. 2018, Student-t variational autoencoder for robust density estimation",
    cases=(Case({}, {"x": (1,)}), Case({"lowest": None}, {"x": (1, 4, 4)}, name="image")),
)
class StudentT(Likelihood):
    """Student-t noise, with location, scale and degrees of freedom of every entry from the decoder.

    The degrees of freedom are 10 where the decoder's third output is 0, and lie between 1 and 100. Below 2 the standard
    deviation is infinite.

    Args:
        lowest: limit at which log_scale is softly clipped (natural logarithm, data units); None for no such limit.
    """

    def __init__(self, lowest: float | None = -6.0) -> None:
        super().__init__()
        self.lowest = lowest

    def outputs(self, shape: Shape) -> dict[str, Shape]:
        return {"location": shape, "log_scale": shape, "tails": shape}

    def marginals(self, output: tuple[Tensor, Tensor, Tensor]) -> dist.TorchDistribution:
        location, log_scale, tails = output
        return StudentTEntries(degrees_of_freedom(tails), location, bounded_scale(log_scale, self.lowest))


class StudentTEntries(dist.StudentT):
    """A Student-t distribution with its distribution function and quantiles, which are not differentiable."""

    def cdf(self, value: Tensor) -> Tensor:
        return self._by_scipy(stdtr, (value - self.loc) / self.scale)

    def icdf(self, value: Tensor) -> Tensor:
        return self.loc + self.scale * self._by_scipy(stdtrit, value)

    def _by_scipy(self, function: Callable[..., Any], value: Tensor) -> Tensor:
        parts = (part.detach().double().cpu().numpy() for part in (self.df, value))
        return torch.as_tensor(np.asarray(function(*parts))).to(value)

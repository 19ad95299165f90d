"""Normal noise."""

from __future__ import annotations

import pyro.distributions as dist
import torch
from torch import Tensor, nn

from calibrant.errors import ProgramError
from calibrant.models.parts.likelihoods.protocol import Likelihood, Shape
from calibrant.models.parts.likelihoods.registry import register_likelihood
from calibrant.registries import Case


@register_likelihood(
    "gaussian",
    density_of="real numbers",
    equations="x ~ Normal(location, σ²), σ learned or fixed",
    cases=(
        Case({}, {"x": (1,)}),
        Case({"scale": 0.1, "learn": False}, {"x": (1, 4, 4)}),
        Case({"shape": (2, 3)}, {"x": (2, 3)}),
    ),
)
class Gaussian(Likelihood):
    """Normal noise around the decoder's output.

    Args:
        scale: standard deviation of the noise, in data units; its initial value if it is learned.
        learn: whether the scale is learned.
        shape: `()` for one scale shared by all entries, the event shape for one scale per entry (factor analysis).
    """

    log_scale: Tensor

    def __init__(self, scale: float = 0.4, learn: bool = True, shape: tuple[int, ...] = ()) -> None:
        super().__init__()
        if not scale > 0:
            raise ProgramError(f"the noise scale is {scale}: a standard deviation must be positive")
        log_scale = torch.full(tuple(shape), float(scale)).log()
        if learn:
            self.log_scale = nn.Parameter(log_scale)
        else:
            self.register_buffer("log_scale", log_scale)

    @property
    def scale(self) -> Tensor:
        """Standard deviation of the noise, in data units."""
        return self.log_scale.exp()

    def outputs(self, shape: Shape) -> dict[str, Shape]:
        return {"location": shape}

    def marginals(self, output: Tensor) -> dist.TorchDistribution:
        return dist.Normal(output, self.scale)

    def noise_sd(self, output: Tensor) -> Tensor:
        return self.scale

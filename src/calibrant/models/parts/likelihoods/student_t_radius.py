"""Normal noise whose variance, one for all entries of an observation, is integrated out."""

from __future__ import annotations

from math import pi, prod
from typing import Any

import pyro.distributions as dist
import torch
from pyro.distributions.util import sum_rightmost
from torch import Tensor, nn
from torch.distributions import constraints

from calibrant.errors import ProgramError
from calibrant.models.parts.likelihoods.protocol import Likelihood, Shape
from calibrant.models.parts.likelihoods.registry import register_likelihood
from calibrant.models.parts.likelihoods.student_t import StudentTEntries
from calibrant.registries import Case

Sizes = torch.Size | list[int] | tuple[int, ...]
_LARGE = 20.0  # from here on, the terms of Stirling's series that are left out are below 1e-6


@register_likelihood(
    "student-t-radius",
    density_of="real numbers",
    equations="x ~ Normal(location, σ² I), σ² ~ InverseGamma(a, b) integrated out, one σ per observation, a, b learned",
    cases=(
        Case({}, {"x": (1,)}),
        Case({"scale": 0.1, "freedom": 30.0}, {"x": (3, 4, 4)}, name="image"),
    ),
)
class StudentTRadius(Likelihood):
    """Normal noise of unknown variance σ², which all entries of an observation share: a multivariate Student-t.

    This is the density that belongs to a noise scale of its own for every image. With D entries,
    log p(x) = log Γ(a + D/2) − log Γ(a) + a log b − (D/2) log 2π − (a + D/2) log(b + ½‖x − location‖²).

    Args:
        scale: √(b/a), the scale of an entry, in data units; its initial value.
        freedom: 2a, the degrees of freedom; its initial value. The fewer, the more the noise differs between
            observations.

    Raises:
        ProgramError: for arguments that are not positive.
    """

    def __init__(self, scale: float = 0.4, freedom: float = 10.0) -> None:
        super().__init__()
        if not (scale > 0 and freedom > 0):
            raise ProgramError(f"scale={scale} and freedom={freedom} are given: both must be positive")
        self.log_scale = nn.Parameter(torch.tensor(float(scale)).log())
        self.log_freedom = nn.Parameter(torch.tensor(float(freedom)).log())

    @property
    def a(self) -> Tensor:
        """Shape of the inverse Gamma distribution of σ²."""
        return self.log_freedom.exp() / 2

    @property
    def b(self) -> Tensor:
        """Scale of the inverse Gamma distribution of σ², in squared data units."""
        return self.a * (2 * self.log_scale).exp()

    def outputs(self, shape: Shape) -> dict[str, Shape]:
        return {"location": shape}

    def marginals(self, output: Tensor) -> dist.TorchDistribution:
        return StudentTEntries(2 * self.a, output, self.log_scale.exp())

    def forward(self, output: Tensor) -> dist.TorchDistribution:
        return NormalOfUnknownVariance(self.a, self.b, output, output.dim() - 1)

    def noise_sd(self, output: Tensor) -> Tensor | None:
        return (self.b / (self.a - 1)).sqrt() if bool(self.a > 1) else None


class NormalOfUnknownVariance(dist.TorchDistribution):
    """Normal(loc, σ² I) with σ² ~ InverseGamma(concentration, rate), one σ² for each event, integrated out.

    Args:
        concentration: a, which broadcasts to the batch shape.
        rate: b, which broadcasts to the batch shape, in squared units of `loc`.
        loc: locations, `(*batch_shape, *event_shape)`.
        event_dim: number of dimensions of an event.
    """

    arg_constraints = {"concentration": constraints.positive, "rate": constraints.positive}
    has_rsample = True

    def __init__(
        self, concentration: Tensor, rate: Tensor, loc: Tensor, event_dim: int, validate_args: bool | None = None
    ) -> None:
        batch_shape, event_shape = loc.shape[: loc.dim() - event_dim], loc.shape[loc.dim() - event_dim :]
        self.concentration, self.rate = concentration.expand(batch_shape), rate.expand(batch_shape)
        self.loc = loc
        super().__init__(batch_shape, event_shape, validate_args=validate_args)

    @constraints.dependent_property(is_discrete=False)
    def support(self) -> constraints.Constraint:
        """Real numbers, in the shape of an event."""
        return constraints.independent(constraints.real, len(self.event_shape))

    def expand(self, batch_shape: Sizes, _instance: Any = None) -> NormalOfUnknownVariance:
        """The distribution with another batch shape."""
        a, b = (part.expand(batch_shape) for part in (self.concentration, self.rate))
        loc = self.loc.expand(*batch_shape, *self.event_shape)
        return NormalOfUnknownVariance(a, b, loc, len(self.event_shape), validate_args=False)

    @property
    def mean(self) -> Tensor:
        """Expectation, `(*batch_shape, *event_shape)`; NaN where there is none."""
        return torch.where(self._as_entries(self.concentration) > 0.5, self.loc, torch.nan)

    @property
    def variance(self) -> Tensor:
        """Variance of every entry; infinite for a ≤ 1."""
        a, b = self._as_entries(self.concentration), self._as_entries(self.rate)
        return torch.where(a > 1, b / (a - 1).clamp_min(torch.finfo(a.dtype).tiny), torch.inf).expand_as(self.loc)

    def rsample(self, sample_shape: Sizes = ()) -> Tensor:
        """Draws `(*sample_shape, *batch_shape, *event_shape)`."""
        variance = dist.InverseGamma(self.concentration, self.rate).rsample(sample_shape)
        noise = torch.randn(self._extended_shape(sample_shape), dtype=self.loc.dtype, device=self.loc.device)
        return self.loc + self._as_entries(variance.sqrt()) * noise

    def log_prob(self, value: Tensor) -> Tensor:
        """Log density in nats, `(*sample_shape, *batch_shape)`."""
        if self._validate_args:
            self._validate_sample(value)
        squares, half = (value - self.loc).square(), prod(self.event_shape) / 2
        squared = sum_rightmost(squares, len(self.event_shape))
        a, b = self.concentration, self.rate
        # a log b − (a + D/2) log(b + r²/2), without the difference of large terms
        fall = (a + half) * torch.log1p(squared / (2 * b)) + half * (2 * pi * b).log()
        return _rise_of_log_gamma(a, half) - fall

    def _as_entries(self, value: Tensor) -> Tensor:
        """A value `(…)` per event, in a shape that broadcasts to the entries."""
        return value.reshape(*value.shape, *[1] * len(self.event_shape))


def _rise_of_log_gamma(a: Tensor, step: float) -> Tensor:
    """log Γ(a + step) − log Γ(a), for large `a` by Stirling's series, where float32 loses the difference."""
    large = a.clamp_min(_LARGE)
    there = large + step
    series = (there - 0.5) * torch.log1p(step / large) + step * large.log() - step + (1 / there - 1 / large) / 12
    small = a.clamp_max(_LARGE)
    return torch.where(a > _LARGE, series, torch.lgamma(small + step) - torch.lgamma(small))

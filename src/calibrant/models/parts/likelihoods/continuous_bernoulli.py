"""The continuous Bernoulli distribution, a density on [0, 1]."""

from __future__ import annotations

import pyro.distributions as dist
import torch
from torch import Size, Tensor
from torch.distributions import constraints

from calibrant.models.parts.likelihoods.protocol import NO_SHAPE, Likelihood, Shape, Shapes
from calibrant.models.parts.likelihoods.registry import register_likelihood
from calibrant.models.parts.likelihoods.series import polynomial
from calibrant.registries import Case

# B₂ₙ / (2n)! (Bernoulli numbers), n = 1, …, 6: with |rate| < ½, the series that they belong to are exact to rounding.
_SERIES = (1 / 12, -1 / 720, 1 / 30240, -1 / 1209600, 1 / 47900160, -691 / 1307674368000)
_SMALL = 0.5
_NOT_ZERO = 1e-20  # replaces a rate of zero in quotients whose limit it does not change


@register_likelihood(
    "continuous-bernoulli",
    density_of="real numbers in [0, 1]",
    equations="p(x) = exp(x η) η / (exp(η) − 1), η = logits",
    paper="Loaiza-Ganem & Cunningham 2019, arXiv 1907.06845",
    cases=(Case({}, {"x": (1,)}), Case({}, {"x": (1, 4, 4)}, name="image")),
)
class ContinuousBernoulli(Likelihood):
    """Independent entries in [0, 1]: cross-entropy with the constant that makes it a density.

    The constant is log(η / tanh(η / 2)), η the logit that the decoder returns.
    """

    support = constraints.unit_interval

    def outputs(self, shape: Shape) -> dict[str, Shape]:
        return {"logits": shape}

    def marginals(self, output: Tensor) -> dist.TorchDistribution:
        return TiltedUniform(output)


class TiltedUniform(dist.TorchDistribution):
    """The density on [0, 1] that is proportional to exp(x η), exact for every η.

    It is an exponential distribution of rate |η|, truncated to [0, 1], of the distance from the end where the density
    is largest.

    Args:
        logits: η.
    """

    arg_constraints = {"logits": constraints.real}
    support = constraints.unit_interval
    has_rsample = True

    def __init__(self, logits: Tensor, validate_args: bool | None = None) -> None:
        self.logits = logits
        super().__init__(logits.shape, validate_args=validate_args)

    @property
    def _rises(self) -> Tensor:
        return self.logits >= 0

    @property
    def _rate(self) -> Tensor:
        """|η|, with a slope of one at zero, as `_reflected` needs it there."""
        return torch.where(self._rises, self.logits, -self.logits)

    def _reflected(self, value: Tensor) -> Tensor:
        """The distance from the end where the density is largest, and back."""
        return torch.where(self._rises, 1 - value, value)

    def log_prob(self, value: Tensor) -> Tensor:
        if self._validate_args:
            self._validate_sample(value)
        rate = self._rate
        near, small, large = _split(rate)
        even = polynomial(small**2, [c / (2 * n) for n, c in _SERIES_BY_ORDER])
        log_normaliser = torch.where(near, small / 2 - small**2 * even, (large / -torch.expm1(-large)).log())
        return log_normaliser - rate * self._reflected(value)

    def rsample(self, sample_shape: Shapes = NO_SHAPE) -> Tensor:
        shape = self._extended_shape(Size(sample_shape))
        return self.icdf(torch.rand(shape, dtype=self.logits.dtype, device=self.logits.device))

    def cdf(self, value: Tensor) -> Tensor:
        rate, value = self._rate.clamp_min(_NOT_ZERO), value.clamp(0, 1)
        height = torch.where(self._rises, (-rate * (1 - value)).exp(), torch.ones_like(rate))
        return height * torch.expm1(-rate * value) / torch.expm1(-rate)

    def icdf(self, value: Tensor) -> Tensor:
        rate = self._rate.clamp_min(_NOT_ZERO)
        distance = -torch.log1p(self._reflected(value) * torch.expm1(-rate)) / rate
        return self._reflected(distance.clamp(0, 1))

    @property
    def mean(self) -> Tensor:
        near, small, large = _split(self._rate)
        series = 0.5 - small * polynomial(small**2, [c for _, c in _SERIES_BY_ORDER])
        return self._reflected(torch.where(near, series, 1 / large - 1 / torch.expm1(large)))

    @property
    def variance(self) -> Tensor:
        near, small, large = _split(self._rate)
        series = polynomial(small**2, [c * (2 * n - 1) for n, c in _SERIES_BY_ORDER])
        decay = (-large).exp()
        return torch.where(near, series, 1 / large**2 - decay / torch.expm1(-large) ** 2)


_SERIES_BY_ORDER = tuple(enumerate(_SERIES, start=1))


def _split(rate: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Which rates are small; these, and the other rates, each with numbers that do no harm in the other's place."""
    near = rate < _SMALL
    return near, torch.where(near, rate, torch.zeros_like(rate)), torch.where(near, torch.ones_like(rate), rate)

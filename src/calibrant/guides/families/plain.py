"""Families whose parameters are the outputs of a plain linear layer, as in most published variational autoencoders.

Location and scale of the prior have no part in them, and the layer has torch's initial weights.
"""

from __future__ import annotations

from collections.abc import Callable
from math import exp, log
from typing import Any

import pyro.distributions as dist
import torch
from torch import Tensor
from torch.distributions import constraints

from calibrant.distributions.directional import Shape
from calibrant.guides.families.densities import OnLine
from calibrant.guides.families.support_text import Support

Build = Callable[[Tensor, Tensor], dist.TorchDistribution]


class Plain(OnLine):
    """A family on the real line or on the positive numbers, for a plain head.

    Args:
        event_shape: event shape of the site.
        support: "real" or "positive"; positive values are mapped to the line by their logarithm.
    """

    is_plain = True

    def __init__(self, event_shape: tuple[int, ...], support: str = "real") -> None:
        super().__init__(event_shape, event_shape, None if support == "real" else Support(support).reach)

    def to_line(self, value: Tensor) -> Tensor:
        return value if self.reach is None else value.clamp_min(torch.finfo(value.dtype).tiny).log()


class LogVariance(Plain):
    """Independent entries, with means and log variances as the outputs of the head: q of most published VAEs.

    Kingma & Welling 2014, arXiv 1312.6114, appendix C.2, for Normals. A new guide is near mean 0 and variance 1 (of the
    logarithm, for positive values).

    Args:
        event_shape: event shape of the site.
        build: the distribution of a mean and a standard deviation.
        support: "real" or "positive".
    """

    def __init__(self, event_shape: tuple[int, ...], build: Build = dist.Normal, support: str = "real") -> None:
        super().__init__(event_shape, support)
        self.distribution = build

    def build(self, raw: Tensor, center: Tensor, width: Tensor) -> dist.TorchDistribution:
        mean, log_variance = raw.reshape(len(raw), 2, *self.line_shape).unbind(1)
        return self.distribution(mean, (log_variance / 2).exp()).to_event(len(self.event_shape))


def laplace_of_sd(mean: Tensor, sd: Tensor) -> dist.TorchDistribution:
    """A Laplace distribution with this standard deviation."""
    return dist.Laplace(mean, sd / 2**0.5)


class TruncatedGamma(dist.TorchDistribution):
    """A Gamma distribution of shape 2, cut to values between 0.001 and 6.5 times its scale θ.

    1.1% of the Gamma distribution lie outside; mean and variance are 1.936 θ and 1.642 θ². Draws are θ times draws of a
    fixed distribution, so that they carry a gradient.

    Args:
        scale: θ, any shape.
    """

    arg_constraints = {"scale": constraints.positive}
    support = constraints.positive
    has_rsample = True
    lowest, highest = 1e-3, 6.5
    _tries = 8  # pairs of exponential draws, of which the first inside is taken: all are outside once in 1e15
    _rounding = 1e-5  # draws keep this relative distance from the ends, so that rounding moves none outside

    def __init__(self, scale: Tensor, validate_args: bool | None = None) -> None:
        self.scale = scale
        super().__init__(scale.shape, torch.Size(), validate_args=validate_args)

    def expand(self, batch_shape: Any, _instance: Any = None) -> TruncatedGamma:
        return TruncatedGamma(self.scale.expand(batch_shape), validate_args=False)

    def rsample(self, sample_shape: Shape = ()) -> Tensor:
        shape = (self._tries, *torch.Size(sample_shape), *self.batch_shape)
        uniform = self.scale.new_empty((2, *shape)).uniform_()
        tries = -uniform.log().sum(0)  # Gamma(2, 1) is the sum of two exponentials
        low, high = self.lowest * (1 + self._rounding), self.highest * (1 - self._rounding)
        inside = (tries > low) & (tries < high)
        first = inside.to(tries.dtype).argmax(0, keepdim=True)
        return self.scale * tries.gather(0, first)[0].clamp(low, high)

    def log_prob(self, value: Tensor) -> Tensor:
        if self._validate_args:
            self._validate_sample(value)
        standard = value / self.scale
        inside = (standard >= self.lowest) & (standard <= self.highest)
        density = standard.log() - standard - self.scale.log() - log(_cdf(self.highest) - _cdf(self.lowest))
        return torch.where(inside, density, -torch.inf)

    @property
    def mean(self) -> Tensor:
        return self.scale * _moment(1, self.lowest, self.highest)

    @property
    def variance(self) -> Tensor:
        first, second = (_moment(power, self.lowest, self.highest) for power in (1, 2))
        return self.scale.square() * (second - first**2)


def _cdf(value: float) -> float:
    """Distribution function of Gamma(2, 1)."""
    return 1 - (1 + value) * exp(-value)


def _moment(power: int, low: float, high: float) -> float:
    """The first or second moment of Gamma(2, 1), cut to an interval."""

    def integral(t: float) -> float:  # of t^(1 + power) e^(−t), from t on
        terms = {1: t**2 + 2 * t + 2, 2: t**3 + 3 * t**2 + 6 * t + 6}
        return terms[power] * exp(-t)

    return (integral(low) - integral(high)) / (_cdf(high) - _cdf(low))


class GammaTruncated(Plain):
    """`TruncatedGamma` with log θ as the output of the head: q of the scale in the EA-VAE for van Hateren's images.

    Catoni et al. 2024, arXiv 2404.15390, from its code, which takes the divergence of the whole Gamma distribution,
    though it draws from the cut one; here density and draws belong together. A posterior that is narrower than
    a coefficient of variation of 0.66 is out of its reach: see docs/guides.md.
    """

    def __init__(self, event_shape: tuple[int, ...]) -> None:
        super().__init__(event_shape, "positive")
        self.raw = self.locations

    def build(self, raw: Tensor, center: Tensor, width: Tensor) -> dist.TorchDistribution:
        return TruncatedGamma(raw.reshape(len(raw), *self.line_shape).exp()).to_event(len(self.event_shape))

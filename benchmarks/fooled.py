"""Programs and guides that fooled a check of moments of single latents: exact samplers, in batches of plain tensors.

The conventions are those of `benchmarks.planted`: draws `(draws, data, latents)`, observations `(data, pixels)`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Generator, Tensor
from torch.special import ndtri

from benchmarks.planted import Guide

BUMPS = 3
BUMP_SD = 0.25  # of one of the bumps that stand in for a Normal distribution with sd 1


def normal(shape: tuple[int, ...], generator: Generator) -> Tensor:
    """Standard Normal noise in single precision, since these programs have many latents."""
    return torch.randn(shape, generator=generator, dtype=torch.float32)


def squares(values: Tensor) -> Tensor:
    """Squared length, in double precision."""
    return values.square().sum(-1, dtype=torch.float64)


# -- one direction among many ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Spike:
    """N(mean · v, D² (I − c v vᵀ)²), with v the direction of the datum and D a diagonal."""

    program: OneDirection
    gain: float  # mean along v, over x
    narrow: float  # c
    factor: Tensor  # the diagonal of D

    def draw(self, x: Tensor, draws: int, generator: Generator) -> tuple[Tensor, Tensor]:
        """See `Guide`."""
        v, noise = x[:, 1:].float(), normal((draws, len(x), self.program.latents), generator)
        log_q = -0.5 * squares(noise)
        theta = noise - self.narrow * (noise * v).sum(-1, keepdim=True) * v
        return theta * self.factor.float() + (self.gain * x[:, :1] * x[:, 1:]).float(), log_q + self._log_det

    def log_q(self, theta: Tensor, x: Tensor) -> Tensor:
        """See `Guide`."""
        v = x[:, 1:].float()
        scaled = (theta - (self.gain * x[:, :1] * x[:, 1:]).float()) / self.factor.float()
        wider = self.narrow / (1 - self.narrow)
        return -0.5 * squares(scaled + wider * (scaled * v).sum(-1, keepdim=True) * v) + self._log_det

    @property
    def _log_det(self) -> float:
        return -float(self.factor.log().sum()) - math.log(1 - self.narrow)


class OneDirection:
    """z ~ N(0, I), x ~ N(v·z, noise²); v is (1, …, 1)/√d, or random and known for each datum."""

    def __init__(self, latents: int, noise: float, varying: bool = False) -> None:
        self.latents, self.noise, self.varying, self.sites = latents, noise, varying, {"z": latents}
        along = noise / math.sqrt(1 + noise**2)  # posterior sd along v
        one = torch.ones(latents, dtype=torch.float64)
        exact = Spike(self, 1 / (1 + noise**2), 1 - along, one)
        mean_field = 1 / math.sqrt(1 + 1 / (latents * noise**2))
        signs = torch.where(torch.arange(latents) % 2 == 0, 1.03, 1 / 1.03).double()
        self.guides: Mapping[str, Guide] = {
            "exact": exact,
            "prior as posterior": Spike(self, 0.0, 0.0, one),
            "best mean field": replace(exact, narrow=0.0, factor=mean_field * one),
            "sd × 1.03": replace(exact, factor=1.03 * one),
            "sds 3% off": replace(exact, factor=signs),
        }

    def simulate(self, size: int, generator: Generator) -> tuple[Tensor, Tensor]:
        """See `Problem`."""
        z = normal((size, self.latents), generator).double()
        v = torch.ones(size, self.latents, dtype=torch.float64)
        if self.varying:
            v = normal((size, self.latents), generator).double()
        v = v / v.norm(dim=1, keepdim=True)
        x = (z * v).sum(1, keepdim=True) + self.noise * normal((size, 1), generator)
        return z, torch.cat([x, v], 1)

    def log_prior(self, theta: Tensor) -> Tensor:
        """See `Problem`."""
        return -0.5 * squares(theta)

    def log_likelihood(self, theta: Tensor, x: Tensor) -> Tensor:
        """See `Problem`."""
        along = (theta * x[:, 1:].to(theta.dtype)).sum(-1).double()
        return -0.5 * ((x[:, 0] - along) / self.noise).square()


# -- one pair among many -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class PairGuide:
    """The posterior of `OnePair`, with its correlation or without."""

    correlation: float

    def draw(self, x: Tensor, draws: int, generator: Generator) -> tuple[Tensor, Tensor]:
        """See `Guide`."""
        theta = normal((draws, len(x), OnePair.latents), generator)
        log_q = -0.5 * squares(theta) - self._log_sd
        theta[..., 1] = self.correlation * theta[..., 0] + math.exp(self._log_sd) * theta[..., 1]
        theta[..., 2] = x[:, 0].float() / 2 + theta[..., 2] / math.sqrt(2)
        return theta, log_q

    def log_q(self, theta: Tensor, x: Tensor) -> Tensor:
        """See `Guide`."""
        noise = theta.clone()
        noise[..., 1] = (theta[..., 1] - self.correlation * theta[..., 0]) / math.exp(self._log_sd)
        noise[..., 2] = (theta[..., 2] - x[:, 0].float() / 2) * math.sqrt(2)
        return -0.5 * squares(noise) - self._log_sd

    @property
    def _log_sd(self) -> float:
        return 0.5 * math.log(1 - self.correlation**2)


class OnePair:
    """100 latents: the first two have correlation 0.75, and x ~ N(z₃, 1)."""

    latents, correlation = 100, 0.75
    sites: Mapping[str, int | None] = {"z": latents}

    def __init__(self) -> None:
        self.guides: Mapping[str, Guide] = {
            "exact": PairGuide(self.correlation),
            "one correlation ignored": PairGuide(0.0),
        }

    def simulate(self, size: int, generator: Generator) -> tuple[Tensor, Tensor]:
        """See `Problem`."""
        z = normal((size, self.latents), generator).double()
        z[:, 1] = self.correlation * z[:, 0] + math.sqrt(1 - self.correlation**2) * z[:, 1]
        return z, z[:, 2:3] + normal((size, 1), generator)

    def log_prior(self, theta: Tensor) -> Tensor:
        """See `Problem`."""
        noise = theta.clone()
        rest = math.sqrt(1 - self.correlation**2)
        noise[..., 1] = (theta[..., 1] - self.correlation * theta[..., 0]) / rest
        return -0.5 * squares(noise)

    def log_likelihood(self, theta: Tensor, x: Tensor) -> Tensor:
        """See `Problem`."""
        return -0.5 * (x[:, 0] - theta[..., 2].double()).square()


# -- heavy tails -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class TailGuide:
    """z = shift + scale · z₀, with z₀ from the posterior; on the log scale for positive latents."""

    program: HeavyTails
    scale: float = 1.0
    shift: float = 0.0

    def draw(self, x: Tensor, draws: int, generator: Generator) -> tuple[Tensor, Tensor]:
        """See `Guide`."""
        raw = self.program.raw((draws, len(x)), generator)
        theta = self.program.from_line(self.shift + self.scale * raw)[..., None]
        return theta, self.log_q(theta, x)

    def log_q(self, theta: Tensor, x: Tensor) -> Tensor:
        """See `Guide`."""
        line = self.program.to_line(theta[..., 0])
        found = self.program.log_raw((line - self.shift) / self.scale) - math.log(self.scale)
        return found - line if self.program.freedom is None else found


class HeavyTails:
    """z ~ Student t, or a LogNormal with σ = 1.5; x is noise, so that the posterior is the prior.

    Args:
        freedom: degrees of freedom; None for the LogNormal.
    """

    sigma = 1.5

    def __init__(self, freedom: float | None) -> None:
        self.freedom, self.sites = freedom, {"z": None}
        iqr_sd = self.sigma if freedom is None else float(_t_quantile(0.75, freedom)) / 0.6744898
        exact = TailGuide(self)
        self.guides: Mapping[str, Guide] = {
            "exact": exact,
            "scale × 0.8": replace(exact, scale=0.8),
            "median + 0.3": replace(exact, shift=0.3 * iqr_sd),
        }

    def raw(self, shape: tuple[int, ...], generator: Generator) -> Tensor:
        """Draws on the line."""
        z = normal(shape, generator).double()
        if self.freedom is None:
            return self.sigma * z
        u = torch.rand(shape, generator=generator, dtype=torch.float64)
        chi = {1.0: lambda: ndtri(u / 2).square(), 2.0: lambda: -2 * u.log()}[self.freedom]()
        return z / (chi / self.freedom).sqrt()

    def log_raw(self, line: Tensor) -> Tensor:
        """Their log density, up to a constant."""
        if self.freedom is None:
            return -0.5 * (line / self.sigma).square()
        return -(self.freedom + 1) / 2 * torch.log1p(line.square() / self.freedom)

    def to_line(self, theta: Tensor) -> Tensor:
        """From the latent to the line."""
        return theta.log() if self.freedom is None else theta

    def from_line(self, line: Tensor) -> Tensor:
        """From the line to the latent."""
        return line.exp() if self.freedom is None else line

    def simulate(self, size: int, generator: Generator) -> tuple[Tensor, Tensor]:
        """See `Problem`."""
        return self.from_line(self.raw((size, 1), generator)), normal((size, 1), generator).double()

    def log_prior(self, theta: Tensor) -> Tensor:
        """See `Problem`."""
        return self.guides["exact"].log_q(theta, theta[0])

    def log_likelihood(self, theta: Tensor, x: Tensor) -> Tensor:
        """See `Problem`."""
        return 0.0 * theta[..., 0] - 0.5 * x[:, 0].square()


def _t_quantile(p: float, freedom: float) -> float:
    return math.tan(math.pi * (p - 0.5)) if freedom == 1 else (2 * p - 1) * math.sqrt(2 / (4 * p * (1 - p)))


# -- single data -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class FewWrong:
    """The exact posterior, wrong for the data whose second pixel is below a share."""

    share: float = 0.0
    factor: float = 1.0
    shift: float = 0.0  # in posterior sds

    def draw(self, x: Tensor, draws: int, generator: Generator) -> tuple[Tensor, Tensor]:
        """See `Guide`."""
        factor, shift = self._defect(x)
        noise = normal((draws, len(x), SingleData.latents), generator).double()
        theta = x[:, 2:] / 2 + (shift + factor * noise) / math.sqrt(2)
        return theta, -0.5 * squares(noise) - SingleData.latents * factor[:, 0].log()

    def log_q(self, theta: Tensor, x: Tensor) -> Tensor:
        """See `Guide`."""
        factor, shift = self._defect(x)
        noise = ((theta - x[:, 2:] / 2) * math.sqrt(2) - shift) / factor
        return -0.5 * squares(noise) - SingleData.latents * factor[:, 0].log()

    def _defect(self, x: Tensor) -> tuple[Tensor, Tensor]:
        wrong = x[:, 1:2] < self.share
        return torch.where(wrong, self.factor, 1.0).double(), torch.where(wrong, self.shift, 0.0).double()


class SingleData:
    """z ~ N(0, I), x ~ N(z, I); another pixel only numbers the data, evenly between 0 and 1."""

    latents = 4
    sites: Mapping[str, int | None] = {"z": latents}

    def __init__(self) -> None:
        self.guides: Mapping[str, Guide] = {
            "exact": FewWrong(),
            "one of 128: mean + 1 sd": FewWrong(1 / 128, shift=1.0),
            "six of 128: sd × 0.68": FewWrong(6 / 128, factor=0.68),
            "twelve of 128: sd × 0.78": FewWrong(12 / 128, factor=0.78),
        }

    def simulate(self, size: int, generator: Generator) -> tuple[Tensor, Tensor]:
        """See `Problem`."""
        z = normal((size, self.latents), generator).double()
        number = (torch.randperm(size, generator=generator).double() + 0.5) / size
        unused = torch.zeros(size, 1, dtype=torch.float64)
        return z, torch.cat([unused, number[:, None], z + normal((size, self.latents), generator)], 1)

    def log_prior(self, theta: Tensor) -> Tensor:
        """See `Problem`."""
        return -0.5 * squares(theta)

    def log_likelihood(self, theta: Tensor, x: Tensor) -> Tensor:
        """See `Problem`."""
        return -0.5 * squares(theta - x[:, 2:])


# -- bumps -------------------------------------------------------------------------------------------------------------


def bumps(shape: tuple[int, ...], generator: Generator) -> Tensor:
    """Three bumps with mean 0 and sd 1."""
    place = torch.randint(BUMPS, shape, generator=generator).double() - 1
    return place * math.sqrt((1 - BUMP_SD**2) * 1.5) + BUMP_SD * normal(shape, generator).double()


def log_bumps(noise: Tensor) -> Tensor:
    """Their log density, in units in which that of a standard Normal is −z²/2."""
    places = torch.arange(-1.0, 2.0, dtype=torch.float64) * math.sqrt((1 - BUMP_SD**2) * 1.5)
    return torch.logsumexp(-0.5 * ((noise[..., None] - places) / BUMP_SD).square(), -1) - math.log(BUMPS * BUMP_SD)


FOOLED: dict[str, Callable[[], object]] = {
    "one direction": lambda: OneDirection(200, 0.7),
    "mean field": lambda: OneDirection(64, 0.4),
    "own directions": lambda: OneDirection(32, 0.4, varying=True),
    "one pair": OnePair,
    "Cauchy": lambda: HeavyTails(1.0),
    "t, 2 degrees": lambda: HeavyTails(2.0),
    "LogNormal 1.5": lambda: HeavyTails(None),
    "single data": SingleData,
}

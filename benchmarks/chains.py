"""Programs whose references are Markov chains, although their posteriors can be sampled exactly.

The guides are exact samplers and their planted defects; the reference is that of `inference.reference(…, "nuts")`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import pyro
import pyro.distributions as dist
import torch
import xarray as xr
from torch import Generator, Tensor

import calibrant as cal
from benchmarks.fooled import normal
from benchmarks.planted import RHO, Guide, Problem, TwoModes, pair

NOISE = 0.1  # of `two modes`: no chain crosses


# -- modes of unequal mass and width -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class MixtureGuide:
    """The posterior of `UnequalModes`, with other weights of its modes.

    Attributes:
        weights: from the posterior weight of the first mode to that of the guide.
    """

    weights: Callable[[Tensor], Tensor] = lambda weight: weight

    def draw(self, x: Tensor, draws: int, generator: Generator) -> tuple[Tensor, Tensor]:
        """See `Guide`."""
        mean, sd, weight = UnequalModes.posterior(x)
        first = torch.rand(draws, len(x), generator=generator, dtype=torch.float64) < self.weights(weight)
        noise = normal((draws, len(x)), generator).double()
        theta = torch.where(first, mean[0] + sd[0] * noise, mean[1] + sd[1] * noise)[..., None]
        return theta, self.log_q(theta, x)

    def log_q(self, theta: Tensor, x: Tensor) -> Tensor:
        """See `Guide`."""
        mean, sd, weight = UnequalModes.posterior(x)
        weight = self.weights(weight)
        parts = [_log_normal(theta[..., 0], mean[k], sd[k]) for k in (0, 1)]
        return torch.logaddexp(parts[0] + weight.log(), parts[1] + (1 - weight).log())


class UnequalModes:
    """z ~ 0.8 N(−3, 1) + 0.2 N(3, 0.3²), x ~ N(z, 4²)."""

    means, sds, shares, noise = (-3.0, 3.0), (1.0, 0.3), (0.8, 0.2), 4.0
    sites: Mapping[str, int | None] = {"z": None}

    def __init__(self) -> None:
        self.guides: Mapping[str, Guide] = {
            "exact": MixtureGuide(),
            "masses 1:1": MixtureGuide(lambda weight: torch.full_like(weight, 0.5)),
        }

    @classmethod
    def posterior(cls, x: Tensor) -> tuple[list[Tensor], list[float], Tensor]:
        """Means and sds of both modes, and the weight of the first, `(data,)`."""
        sd = [1 / math.sqrt(1 / s**2 + 1 / cls.noise**2) for s in cls.sds]
        mean = [d**2 * (m / s**2 + x[:, 0] / cls.noise**2) for d, m, s in zip(sd, cls.means, cls.sds, strict=True)]
        logs = [
            _log_normal(x[:, 0], torch.tensor(m), math.hypot(s, cls.noise)) + math.log(share)
            for m, s, share in zip(cls.means, cls.sds, cls.shares, strict=True)
        ]
        return mean, sd, torch.sigmoid(logs[0] - logs[1])

    def simulate(self, size: int, generator: Generator) -> tuple[Tensor, Tensor]:
        """See `Problem`."""
        first = torch.rand(size, 1, generator=generator, dtype=torch.float64) < self.shares[0]
        noise = normal((size, 1), generator).double()
        z = torch.where(first, self.means[0] + self.sds[0] * noise, self.means[1] + self.sds[1] * noise)
        return z, z + self.noise * normal((size, 1), generator)

    def log_prior(self, theta: Tensor) -> Tensor:
        """See `Problem`."""
        parts = [
            _log_normal(theta[..., 0], torch.tensor(m), s) + math.log(share)
            for m, s, share in zip(self.means, self.sds, self.shares, strict=True)
        ]
        return torch.logaddexp(parts[0], parts[1])

    def log_likelihood(self, theta: Tensor, x: Tensor) -> Tensor:
        """See `Problem`."""
        return -0.5 * ((x[:, 0] - theta[..., 0]) / self.noise).square()


def _log_normal(value: Tensor, mean: Tensor, sd: float) -> Tensor:
    return -0.5 * ((value - mean) / sd).square() - math.log(sd)


# -- the programs in Pyro ----------------------------------------------------------------------------------------------


def _pair(size: int) -> None:
    root = torch.tensor([[1.0, 0.0], [RHO, math.sqrt(1 - RHO**2)]])
    with pyro.plate("data", size):
        z = pyro.sample("z", dist.MultivariateNormal(torch.zeros(2), scale_tril=root))
        pyro.sample("x", dist.MultivariateNormal(z, scale_tril=root))


def _two_modes(size: int) -> None:
    with pyro.plate("data", size):
        z = pyro.sample("z", dist.Normal(torch.tensor(0.0), 1.0))
        pyro.sample("x", dist.Normal(z.abs()[:, None], NOISE).to_event(1))


def _unequal(size: int) -> None:
    own = UnequalModes
    modes = dist.Normal(torch.tensor(own.means), torch.tensor(own.sds))
    with pyro.plate("data", size):
        prior = dist.MixtureSameFamily(dist.Categorical(torch.tensor(own.shares)), modes)
        z = pyro.sample("z", prior)
        pyro.sample("x", dist.Normal(z[:, None], own.noise).to_event(1))


@dataclass(frozen=True)
class Chains:
    """An exact program whose reference is sampled by NUTS."""

    problem: Problem
    program: Callable[[int], None]

    def reference(self, x: Tensor, draws: int, seed: int) -> xr.DataTree:
        """The reference of these data, four chains of so many draws."""
        return cal.inference.reference(self.program, {"x": x.float()}, "nuts", draws=draws, seed=seed)


CHAINS: Mapping[str, Callable[[], Chains]] = {
    "pair, NUTS": lambda: Chains(pair(), _pair),
    "two modes, NUTS": lambda: Chains(TwoModes(NOISE), _two_modes),
    "unequal modes, NUTS": lambda: Chains(UnequalModes(), _unequal),
}

"""A linear-Gaussian program with guides whose divergences are known: exact, and wrong in a way that is known."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor
from torch.distributions import MultivariateNormal, kl_divergence

import calibrant as cal


@dataclass(frozen=True)
class Linear:
    """z ~ N(0, I), x ~ N(A z, noise²), with its posterior N(gain x, covariance), all in float64."""

    loading: Tensor  # (pixels, latents)
    noise: float

    @classmethod
    def random(cls, pixels: int, latents: int, noise: float, seed: int = 0) -> Linear:
        generator = torch.Generator().manual_seed(seed)
        return cls(torch.randn(pixels, latents, generator=generator, dtype=torch.float64), noise)

    @property
    def covariance(self) -> Tensor:
        precision = torch.eye(self.loading.shape[1]).double() + self.loading.T @ self.loading / self.noise**2
        return torch.linalg.inv(precision)

    @property
    def gain(self) -> Tensor:
        return self.covariance @ self.loading.T / self.noise**2

    @property
    def marginal(self) -> MultivariateNormal:
        pixels = len(self.loading)
        covariance = self.loading @ self.loading.T + self.noise**2 * torch.eye(pixels).double()
        return MultivariateNormal(torch.zeros(pixels).double(), covariance)

    def program(self) -> Callable[[int], None]:
        loading, noise = self.loading, self.noise

        def program(size: int) -> None:
            with pyro.plate("data", size):
                z = pyro.sample("z", dist.Normal(torch.zeros(loading.shape[1]), 1.0).to_event(1))
                pyro.sample("x", dist.Normal(z @ loading.T.to(z.dtype), noise).to_event(1))

        return program

    def posterior(self, x: Tensor, shift: float = 0.0, widen: float = 1.0) -> MultivariateNormal:
        """The posterior at data `(data, pixels)`, its means shifted and its sds multiplied."""
        return MultivariateNormal(x.double() @ self.gain.T + shift, widen**2 * self.covariance)

    def guide(self, shift: float = 0.0, widen: float = 1.0) -> Callable[..., None]:
        def guide(observed: Any, size: int) -> None:
            fn = self.posterior(observed["x"], shift, widen)
            dtype = observed["x"].dtype
            with pyro.plate("data", size):
                pyro.sample("z", dist.MultivariateNormal(fn.loc.to(dtype), scale_tril=fn.scale_tril.to(dtype)))

        return guide

    def data(self, size: int, seed: int = 5) -> dict[str, Tensor]:
        return {"x": cal.program.sample_prior(self.program(), size, seed=seed)["x"]}

    def terms(self, x: Tensor, **wrong: float) -> dict[str, Tensor]:
        """Rate, distortion and log evidence of every datum, in nats."""
        fn = self.posterior(x, **wrong)
        prior = MultivariateNormal(torch.zeros_like(fn.loc[0]), torch.eye(fn.loc.shape[1]).double())
        residual = x.double() - fn.loc @ self.loading.T
        spread = torch.trace(self.loading @ fn.covariance_matrix[0] @ self.loading.T)
        constant = 0.5 * x.shape[1] * torch.log(torch.tensor(2 * torch.pi * self.noise**2).double())
        distortion = constant + (residual.square().sum(1) + spread) / (2 * self.noise**2)
        return {
            "rate": kl_divergence(fn, prior),
            "distortion": distortion,
            "log_evidence": self.marginal.log_prob(x.double()),
            "gap": kl_divergence(fn, self.posterior(x)),
        }

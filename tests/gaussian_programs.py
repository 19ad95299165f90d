"""Linear-Gaussian programs with what is known of them by dense algebra."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import pyro
import pyro.distributions as dist
import torch
from torch import Tensor
from torch.distributions import MultivariateNormal

import calibrant as cal

PIXELS, LATENTS = 6, 3


def normal(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def here(constant: Tensor | float) -> Tensor:
    """A constant in the dtype that the program runs in."""
    return torch.as_tensor(constant).to(torch.get_default_dtype())


A, B, BIAS = normal(PIXELS, LATENTS, seed=0), normal(PIXELS, 1, seed=1), normal(PIXELS, seed=2)
ROOT = torch.tensor([[1.5, 0.0, 0.0], [-0.7, 0.8, 0.0], [0.3, 0.4, 0.5]]).double()
FACTOR, SPREAD = normal(LATENTS, 2, seed=3), torch.tensor([0.2, 0.5, 1.0]).double()
NOISE = torch.tensor([0.2, 0.3, 0.4, 0.5, 0.6, 0.7]).double()
CENTRE, ONES = torch.tensor([3.0, -2.0, 0.5]).double(), torch.ones(LATENTS, LATENTS).double()


def standard() -> dist.TorchDistribution:
    return dist.Normal(0.0, 1.0).expand([LATENTS]).to_event(1)


def affine(
    prior: Callable[[], Any] = standard,
    noise: float | Tensor = 0.5,
    scale: Callable[[], Any] | None = None,
    offset: float | Tensor = 0.0,
    shift: float | Tensor = 0.0,
) -> Callable[[int], None]:
    """x = offset + s (shift + A z) + ε as a plain function."""

    def program(size: int) -> None:
        with pyro.plate("data", size):
            s = pyro.sample("s", scale())[:, None] if scale else 1.0
            z = pyro.sample("z", prior())
            pyro.sample("x", dist.Normal(here(offset) + s * (here(shift) + z @ here(A.T)), here(noise)).to_event(1))

    return program


def two_sites(size: int) -> None:
    with pyro.plate("data", size):
        z1 = pyro.sample("z1", dist.Normal(1.0, 2.0).expand([LATENTS]).to_event(1))
        z2 = pyro.sample("z2", dist.Normal(-3.0, 0.3))
        pyro.sample("x", dist.Normal(z1 @ here(A.T) + z2[:, None] * here(B[:, 0]), 0.5).to_event(1))


def hierarchical(size: int) -> None:
    with pyro.plate("data", size):
        top = pyro.sample("top", dist.Normal(1.0, 2.0))
        z = pyro.sample("z", dist.Normal(2.0 * top[:, None] + here(CENTRE), 0.7).to_event(1))
        pyro.sample("x", dist.Normal(here(BIAS) + z @ here(A.T), 0.5).to_event(1))


def hierarchical_scaled(size: int) -> None:
    with pyro.plate("data", size):
        top = pyro.sample("top", dist.Normal(1.0, 2.0))
        s = pyro.sample("s", dist.LogNormal(-0.5, 0.625))
        z = pyro.sample("z", dist.Normal(2.0 * top[:, None] + here(CENTRE), 0.7).to_event(1))
        pyro.sample("x", dist.Normal(s[:, None] * (z @ here(A.T)), 0.5).to_event(1))


def matrix(size: int) -> None:
    with pyro.plate("data", size):
        z = pyro.sample("z", dist.Normal(0.0, 1.0).expand([LATENTS, 2]).to_event(2))
        pyro.sample("x", dist.Normal(here(A) @ z, here(NOISE[:, None])).to_event(2))


def walk(size: int) -> None:
    with pyro.plate("data", size):
        steps, place = [], 0.0
        for i in range(PIXELS):
            place = pyro.sample(f"z{i}", dist.Normal(0.9 * place, 1.0))
            steps.append(place)
        pyro.sample("x", dist.Normal(torch.stack(steps, -1), 0.5).to_event(1))


def scalar(size: int) -> None:
    with pyro.plate("data", size):
        z = pyro.sample("z", dist.Normal(1.0, 2.0))
        pyro.sample("x", dist.Normal(3.0 - z, 0.5))


class Truth(NamedTuple):
    """x given s is N(offset + s shift, s² signal + noise), by hand."""

    offset: Tensor | float
    shift: Tensor | float
    signal: Tensor
    noise: Tensor | float = 0.5
    scale: Any = None

    def given(self, x: Tensor, s: Tensor) -> Tensor:
        """log p(x | s) at scales (n,)."""
        noise = torch.eye(len(x)) * torch.as_tensor(self.noise).double() ** 2
        mean = (self.offset + s[:, None] * self.shift) * torch.ones(len(x))
        return MultivariateNormal(mean, s[:, None, None] ** 2 * self.signal + noise).log_prob(x)

    def log_joint(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Scales, and the log of p(x, s) times the weight of a Gauss-Legendre rule over log s."""
        low, high = (math.log(0.5), math.log(2.0)) if isinstance(self.scale, dist.Uniform) else (-25.0, 6.0)
        node, weight = (torch.from_numpy(values) for values in np.polynomial.legendre.leggauss(1000))
        t = (low + high) / 2 + (high - low) / 2 * node
        return t.exp(), self.given(x, t.exp()) + self.scale.log_prob(t.exp()) + t + (weight * (high - low) / 2).log()

    def log_evidence(self, x: Tensor) -> float:
        return float(self.given(x, torch.ones(1))[0] if self.scale is None else self.log_joint(x)[1].logsumexp(0))


GRAM, ROOT_GRAM, TOP_GRAM = (
    A @ A.T,
    A @ ROOT @ ROOT.T @ A.T,
    A @ (16.0 * ONES + 0.49 * torch.eye(LATENTS).double()) @ A.T,
)
LOGNORMAL, GAMMA, HALF = dist.LogNormal(-0.5, 0.625), dist.Gamma(2.0, 1.5), dist.HalfNormal(1.25)
WALK = torch.tensor(
    [[0.9 ** (i - j) if i >= j else 0.0 for j in range(PIXELS)] for i in range(PIXELS)], dtype=torch.float64
)
SOLVED: dict[str, tuple[Callable[[int], None], Truth]] = {
    "ppca": (affine(offset=BIAS), Truth(BIAS, 0.0, GRAM)),
    "noise of each pixel": (affine(noise=NOISE), Truth(0.0, 0.0, GRAM, NOISE)),
    "prior mean": (
        affine(lambda: dist.Normal(here(CENTRE), here(SPREAD)).to_event(1)),
        Truth(A @ CENTRE, 0.0, A * SPREAD**2 @ A.T),
    ),
    "multivariate": (
        affine(lambda: dist.MultivariateNormal(here(CENTRE), here(ROOT @ ROOT.T)), offset=BIAS),
        Truth(BIAS + A @ CENTRE, 0.0, ROOT_GRAM),
    ),
    "scale_tril": (
        affine(lambda: dist.MultivariateNormal(torch.zeros(LATENTS), scale_tril=here(ROOT))), Truth(0.0, 0.0, ROOT_GRAM)
    ),
    "low rank": (
        affine(lambda: dist.LowRankMultivariateNormal(here(CENTRE), here(FACTOR), here(SPREAD))),
        Truth(A @ CENTRE, 0.0, A @ (FACTOR @ FACTOR.T + torch.diag(SPREAD)) @ A.T),
    ),
    "two sites": (two_sites, Truth(A.sum(1) - 3.0 * B[:, 0], 0.0, 4.0 * GRAM + 0.09 * B @ B.T)),
    "hierarchical": (
        hierarchical,
        Truth(BIAS + A @ (CENTRE + 2.0), 0.0, TOP_GRAM),
    ),
    "random walk": (walk, Truth(0.0, 0.0, WALK @ WALK.T)),
    "matrices": (
        matrix, Truth(0.0, 0.0, torch.kron(GRAM, torch.eye(2).double()), NOISE.repeat_interleave(2))
    ),
    "scalars": (scalar, Truth(2.0, 0.0, torch.tensor([[4.0]]).double())),
    "lognormal scale": (affine(scale=lambda: LOGNORMAL), Truth(0.0, 0.0, GRAM, scale=LOGNORMAL)),
    "gamma scale of the output": (
        affine(scale=lambda: GAMMA, shift=BIAS), Truth(0.0, BIAS, GRAM, scale=GAMMA)
    ),
    "half-normal scale, offset": (
        affine(scale=lambda: HALF, offset=BIAS, shift=B[:, 0]), Truth(BIAS, B[:, 0], GRAM, scale=HALF)
    ),
    "scale between bounds": (
        affine(scale=lambda: dist.Uniform(0.5, 2.0)), Truth(0.0, 0.0, GRAM, scale=dist.Uniform(0.5, 2.0))
    ),
    "scale, prior mean": (
        affine(lambda: dist.MultivariateNormal(here(CENTRE), scale_tril=here(ROOT)), NOISE, lambda: LOGNORMAL, BIAS),
        Truth(BIAS, A @ CENTRE, ROOT_GRAM, NOISE, LOGNORMAL),
    ),
    "scale, hierarchical": (
        hierarchical_scaled,
        Truth(0.0, A @ (CENTRE + 2.0), TOP_GRAM, scale=LOGNORMAL),
    ),
}  # fmt: skip


def simulate(program: Callable[..., None], size: int = 3) -> dict[str, Tensor]:
    return {"x": cal.program.sample_prior(program, size, seed=5)["x"]}


def two_observations(size: int) -> None:
    with pyro.plate("data", size):
        z = pyro.sample("z", standard())
        pyro.sample("x", dist.Normal(z @ here(A.T), 0.5).to_event(1))
        pyro.sample("y", dist.Normal(z.sum(-1), 0.5))

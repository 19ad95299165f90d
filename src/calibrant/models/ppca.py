"""Probabilistic PCA and factor analysis."""

from __future__ import annotations

import pyro
import pyro.distributions as dist
import torch
from pyro.nn import PyroModule

from calibrant.errors import ProgramError
from calibrant.models.parts.decoders import LinearDecoder
from calibrant.models.parts.likelihoods.gaussian import Gaussian
from calibrant.models.registry import register_model
from calibrant.registries import Case


@register_model(
    "ppca",
    paper="Tipping & Bishop 1999, Probabilistic principal component analysis",
    equations="x = W z + μ + ε, z ~ N(0, I), ε ~ N(0, σ² I); factor analysis: one σ per pixel",
    licence="Apache-2.0",
    cases=(
        Case({"shape": (1, 8, 8), "latents": 3}, {"x": (1, 8, 8)}, is_exact=True, name="isotropic"),
        Case({"shape": (6,), "latents": 3, "noise": "diagonal"}, {"x": (6,)}, is_exact=True, name="diagonal"),
    ),
)
class PPCA(PyroModule):
    """Probabilistic PCA (`noise="isotropic"`) or factor analysis (`noise="diagonal"`), both learned.

    Args:
        shape: event shape of `x`.
        latents: dimension of `z`.
        noise: "isotropic" for one standard deviation of all pixels, "diagonal" for one per pixel.
    """

    dims = {"z": ["feature"]}

    def __init__(self, shape: tuple[int, ...], latents: int = 16, noise: str = "isotropic") -> None:
        super().__init__()
        if noise not in ("isotropic", "diagonal"):
            raise ProgramError(f"unknown noise {noise!r}; known: isotropic, diagonal")
        self.latents = latents
        self.decoder = LinearDecoder(latents, tuple(shape))
        self.likelihood = Gaussian(0.5, shape=tuple(shape) if noise == "diagonal" else ())

    def forward(self, size: int) -> torch.Tensor:
        with pyro.plate("data", size):
            z = pyro.sample("z", dist.Normal(0.0, 1.0).expand([self.latents]).to_event(1))
            return pyro.sample("x", self.likelihood(self.decoder(z)))

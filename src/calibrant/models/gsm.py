"""The Gaussian scale mixture of natural images."""

from __future__ import annotations

from math import prod
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from pyro.nn import PyroModule
from torch import Tensor

from calibrant.errors import ProgramError
from calibrant.models.parts.decoders import LinearDecoder
from calibrant.models.parts.likelihoods.gaussian import Gaussian
from calibrant.models.parts.priors import named_scale_prior
from calibrant.models.registry import register_model
from calibrant.registries import Case

Matrix = list[list[float]]
SMALL = {"shape": (1, 8, 8), "latents": 3}
IMAGE = {"x": (1, 8, 8)}
WAVES = [[1.0, (-1.0) ** pixel, (pixel % 3) - 1.0] for pixel in range(64)]
CORRELATED = [[2.0, 0.5, 0.0], [0.5, 1.0, 0.0], [0.0, 0.0, 1.0]]
RAYLEIGH = {"name": "rayleigh", "scale": 2.0}


@register_model(
    "gsm",
    paper="Wainwright & Simoncelli 2000, Scale mixtures of Gaussians; Orbán et al. 2016 (arXiv 2404.15390, section 2)",
    equations="x = s·A y + ε, y ~ N(0, C), ε ~ N(0, σ² I), s ~ LogNormal, Gamma or Rayleigh",
    licence="Apache-2.0",
    cases=(
        Case(SMALL, IMAGE, is_exact=True, name="lognormal"),
        Case({**SMALL, "scale_prior": "gamma"}, IMAGE, is_exact=True, name="gamma"),
        Case({**SMALL, "scale_prior": RAYLEIGH}, IMAGE, is_exact=True, name="rayleigh"),
        Case({**SMALL, "dictionary": WAVES}, IMAGE, is_exact=True, name="dictionary"),
        Case({**SMALL, "covariance": CORRELATED, "learn_noise": False}, IMAGE, is_exact=True, name="covariance"),
    ),
)
class GSM(PyroModule):
    """A Gaussian scale mixture: one scale multiplies all coefficients `y` of a dictionary A.

    Args:
        shape: event shape of `x`.
        latents: dimension of `y`; if `dictionary` is given, its number of columns is used instead.
        scale_prior: "lognormal", "gamma" or "rayleigh", or `{"name": …, **parameters}`.
        dictionary: A, `(pixels, latents)`, which stays fixed. If it is None, A is learned, with columns of fixed norm
            √(pixels/latents), so that `s` is the standard deviation of a pixel's signal.
        covariance: C, `(latents, latents)`; None for the identity.
        noise: standard deviation σ, in data units.
        learn_noise: whether σ is learned.
    """

    dims = {"y": ["feature"]}
    covariance_root: Tensor | None
    fixed: Any

    def __init__(
        self,
        shape: tuple[int, ...],
        latents: int = 64,
        scale_prior: str | dict[str, Any] = "lognormal",
        dictionary: Matrix | Tensor | None = None,
        covariance: Matrix | Tensor | None = None,
        noise: float = 0.4,
        learn_noise: bool = True,
    ) -> None:
        super().__init__()
        self.shape, pixels = tuple(shape), prod(shape)
        self.register_buffer("fixed", None if dictionary is None else torch.as_tensor(dictionary, dtype=torch.float32))
        if self.fixed is not None and (self.fixed.dim() != 2 or len(self.fixed) != pixels):
            raise ProgramError(f"dictionary has shape {tuple(self.fixed.shape)}, wanted ({pixels}, latents)")
        self.latents = latents if self.fixed is None else self.fixed.shape[1]
        norm = (pixels / self.latents) ** 0.5
        self.learned = LinearDecoder(latents, self.shape, norm, bias=False) if self.fixed is None else None
        self.register_buffer("covariance_root", None if covariance is None else _root(covariance, self.latents))
        self.prior = named_scale_prior(scale_prior, ("lognormal", "gamma", "rayleigh"))
        self.likelihood = Gaussian(noise, learn_noise)

    @property
    def dictionary(self) -> Tensor:
        """A, `(pixels, latents)`."""
        return self.learned.weight if self.learned is not None else self.fixed

    def forward(self, size: int) -> Tensor:
        with pyro.plate("data", size):
            scale = pyro.sample("scale", self.prior())
            y = pyro.sample("y", self._coefficients())
            return pyro.sample("x", self.likelihood((scale[:, None] * y @ self.dictionary.T).reshape(-1, *self.shape)))

    def _coefficients(self) -> dist.TorchDistribution:
        if self.covariance_root is None:
            return dist.Normal(0.0, 1.0).expand([self.latents]).to_event(1)
        root = self.covariance_root
        return dist.MultivariateNormal(root.new_zeros(self.latents), scale_tril=root)


def _root(covariance: Matrix | Tensor, latents: int) -> Tensor:
    matrix = torch.as_tensor(covariance, dtype=torch.float64)
    if matrix.shape != (latents, latents):
        raise ProgramError(f"covariance has shape {tuple(matrix.shape)}, wanted ({latents}, {latents})")
    root, failed = torch.linalg.cholesky_ex(matrix)
    if failed or not torch.equal(matrix, matrix.T):
        raise ProgramError("covariance must be symmetric and positive definite")
    return root.float()

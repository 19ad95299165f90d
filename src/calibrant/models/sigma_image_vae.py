"""A variational autoencoder in which every image has noise of its own."""

from __future__ import annotations

from typing import Any

import pyro
import pyro.distributions as dist
import torch
from pyro.nn import PyroModule
from torch import Tensor, nn

from calibrant.errors import ProgramError
from calibrant.models.parts.decoders import make_decoder
from calibrant.models.parts.priors import vector_prior
from calibrant.models.registry import register_model
from calibrant.registries import Case

SMALL = {"shape": (1, 8, 8), "latents": 3}
IMAGE = {"x": (1, 8, 8)}


@register_model(
    "sigma-image-vae",
    paper="Rybkin, Daniilidis & Levine 2021, arXiv 2006.13202, appendix D",
    equations="z ~ Normal or Laplace(0, 1), sigma ~ LogNormal, x ~ Normal(decoder(z), sigma²), one sigma per image",
    licence="Apache-2.0",
    cases=(
        Case(SMALL, IMAGE, name="linear"),
        Case({**SMALL, "prior": "laplace", "decoder": "mlp", "spread": 0.2}, IMAGE, name="laplace-mlp"),
    ),
)
class SigmaImageVAE(PyroModule):
    """A VAE whose noise has a standard deviation of its own for every image, a latent with a learned LogNormal prior.

    Without a prior, the noise of every image at its best value would be no density: its mass is infinite where the
    decoder comes close to the image.

    Args:
        shape: event shape of `x`.
        latents: dimension of `z`.
        prior: prior of `z`: "normal" or "laplace", with location 0 and scale 1, or `{"name": …, "loc": …, "scale": …}`.
        decoder: a name, `{"name": …, **arguments}`, or a module that maps `(size, latents)` to the mean of `x`, `(size,
            *shape)`.
        scale: median of `sigma` under its prior, in data units; its initial value.
        spread: standard deviation of log `sigma` under its prior; its initial value.
    """

    dims = {"z": ["feature"]}
    decoder: Any

    def __init__(
        self,
        shape: tuple[int, ...],
        latents: int = 64,
        prior: str | dict[str, Any] = "normal",
        decoder: str | dict[str, Any] | nn.Module = "linear",
        scale: float = 0.4,
        spread: float = 0.5,
    ) -> None:
        super().__init__()
        if not (scale > 0 and spread > 0):
            raise ProgramError(f"scale={scale} and spread={spread} are given: both must be positive")
        self.prior = vector_prior(prior, latents)
        self.decoder = make_decoder(decoder, latents, {"location": tuple(shape)})
        self.log_scale = nn.Parameter(torch.tensor(float(scale)).log())
        self.log_spread = nn.Parameter(torch.tensor(float(spread)).log())

    def forward(self, size: int) -> Tensor:
        with pyro.plate("data", size):
            z = pyro.sample("z", self.prior())
            sigma = pyro.sample("sigma", dist.LogNormal(self.log_scale, self.log_spread.exp()))
            location = self.decoder(z)
            entries = location.dim() - 1
            return pyro.sample("x", dist.Normal(location, sigma.reshape(-1, *[1] * entries)).to_event(entries))

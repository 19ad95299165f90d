"""The variational autoencoder's generative model."""

from __future__ import annotations

from typing import Any

import pyro
from pyro.nn import PyroModule
from torch import Tensor, nn

from calibrant.models.parts.decoders import make_decoder
from calibrant.models.parts.likelihoods import make_likelihood
from calibrant.models.parts.priors import vector_prior
from calibrant.models.registry import register_model


@register_model(
    "vae",
    paper="Kingma & Welling 2014, arXiv 1312.6114; the standard VAE of arXiv 2404.15390",
    equations="z ~ Normal or Laplace(0, 1), x ~ likelihood(decoder(z))",
    licence="Apache-2.0",
)
class VAE(PyroModule):
    """A decoder and a likelihood on independent latents.

    Args:
        shape: event shape of `x`.
        latents: dimension of `z`.
        prior: "normal" or "laplace", location 0 and scale 1.
        decoder: "linear", "mlp", "conv", or a module `(size, latents) → (size, *shape)`.
        likelihood: "gaussian" (a learned shared scale), "bernoulli", `{"name": …, **arguments}`, or a module.
    """

    dims = {"z": ["feature"]}
    decoder: Any
    likelihood: Any

    def __init__(
        self,
        shape: tuple[int, ...],
        latents: int = 64,
        prior: str = "normal",
        decoder: str | nn.Module = "linear",
        likelihood: str | dict[str, Any] | nn.Module = "gaussian",
    ) -> None:
        super().__init__()
        self.prior = vector_prior(prior, latents)
        self.decoder = make_decoder(decoder, latents, shape)
        self.likelihood = make_likelihood(likelihood)

    def forward(self, size: int) -> Tensor:
        with pyro.plate("data", size):
            z = pyro.sample("z", self.prior())
            return pyro.sample("x", self.likelihood(self.decoder(z)))

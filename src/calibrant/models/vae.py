"""The variational autoencoder's generative model."""

from __future__ import annotations

from typing import Any

import pyro
from pyro.nn import PyroModule
from torch import Tensor, nn

from calibrant.models.parts.decoders import make_decoder
from calibrant.models.parts.ea_vae_presets import VAE_PRESETS
from calibrant.models.parts.likelihoods.protocol import outputs_of
from calibrant.models.parts.likelihoods.registry import make_likelihood
from calibrant.models.parts.priors import vector_prior
from calibrant.models.registry import register_model
from calibrant.registries import Case

SMALL = {"shape": (1, 8, 8), "latents": 3}
IMAGE = {"x": (1, 8, 8)}
FIXED_NOISE = {"name": "gaussian", "scale": 0.1, "learn": False}


@register_model(
    "vae",
    paper="Kingma & Welling 2014, arXiv 1312.6114; the standard VAE of arXiv 2404.15390",
    equations="z ~ Normal or Laplace(0, 1), x ~ likelihood(decoder(z))",
    licence="Apache-2.0",
    cases=(
        Case(SMALL, IMAGE, is_exact=True, name="linear"),
        Case({**SMALL, "prior": "laplace", "decoder": "mlp"}, IMAGE, name="laplace-mlp"),
        Case({**SMALL, "decoder": "conv", "likelihood": FIXED_NOISE}, IMAGE, name="conv-fixed-noise"),
        Case({**SMALL, "decoder": "mlp", "likelihood": "bernoulli"}, IMAGE, name="mlp-bernoulli"),
    ),
    presets=VAE_PRESETS,
)
class VAE(PyroModule):
    """A decoder and a likelihood on independent latents.

    Args:
        shape: event shape of `x`.
        latents: dimension of `z`.
        prior: prior of `z`: "normal" or "laplace", with location 0 and scale 1, or `{"name": …, "loc": …, "scale": …}`.
        decoder: "linear", "mlp", "conv", "sigma-vae" or "ea-vae-conv", `{"name": …, **arguments}`, or a module that
            maps `(size, latents)` to the input of the likelihood, which for a Gaussian has shape `(size, *shape)`.
        likelihood: a name of `list_likelihoods()`, `{"name": …, **arguments}`, or a module; "gaussian" has a
            scale that is learned and shared by all entries.
    """

    dims = {"z": ["feature"]}
    decoder: Any
    likelihood: Any

    def __init__(
        self,
        shape: tuple[int, ...],
        latents: int = 64,
        prior: str | dict[str, Any] = "normal",
        decoder: str | dict[str, Any] | nn.Module = "linear",
        likelihood: str | dict[str, Any] | nn.Module = "gaussian",
    ) -> None:
        super().__init__()
        self.prior = vector_prior(prior, latents)
        noise = make_likelihood(likelihood, tuple(shape))
        self.decoder = make_decoder(decoder, latents, outputs_of(noise, tuple(shape)))
        self.likelihood = noise

    def forward(self, size: int) -> Tensor:
        with pyro.plate("data", size):
            z = pyro.sample("z", self.prior())
            return pyro.sample("x", self.likelihood(self.decoder(z)))

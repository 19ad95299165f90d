"""The explaining-away variational autoencoder: a VAE whose latents share a global scale."""

from __future__ import annotations

from math import prod
from typing import Any

import pyro
from pyro.nn import PyroModule
from torch import Tensor, nn

from calibrant.errors import ProgramError
from calibrant.models.parts.decoders import make_decoder
from calibrant.models.parts.likelihoods import Bernoulli, make_likelihood
from calibrant.models.parts.priors import named_scale_prior, vector_prior
from calibrant.models.registry import register_model

MULTIPLIES = ("latents", "output", "logits")


@register_model(
    "ea-vae",
    paper="Catoni, Martos, Csikor, Ferrante, Milone, Meszéna, Orbán & Echeveste, arXiv 2404.15390",
    equations="s ~ LogNormal, Gamma or softplus-Laplace; x ~ likelihood(decoder(s·z)), or likelihood(s·decoder(z))",
    licence="Apache-2.0",
)
class EAVAE(PyroModule):
    """A VAE with a global scale, so that contrast and content explain each other away.

    Args:
        shape: event shape of `x`.
        latents: dimension of `z`.
        prior: prior of `z`: "normal" or "laplace", location 0 and scale 1.
        decoder: "linear", "mlp", "conv", or a module. The columns of the linear one have the fixed norm
            √(pixels/latents), so that scale and dictionary do not trade off: `scale` is then the standard deviation of
            a pixel's signal under the Normal prior.
        scale_prior: "lognormal", "gamma" or "softplus-laplace", or `{"name": …, **parameters}`.
        multiplies: what the scale multiplies: the "latents", the decoder's "output" (its bias too), or the "logits"
            of a Bernoulli likelihood (scale 0 is then mid-grey, not blank).
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
        scale_prior: str | dict[str, Any] = "lognormal",
        multiplies: str = "latents",
        likelihood: str | dict[str, Any] | nn.Module | None = None,
    ) -> None:
        super().__init__()
        if multiplies not in MULTIPLIES:
            raise ProgramError(f"multiplies={multiplies!r}; the scale multiplies one of {MULTIPLIES}")
        self.multiplies = multiplies
        self.prior = vector_prior(prior, latents)
        self.prior_of_scale = named_scale_prior(scale_prior, ("lognormal", "gamma", "softplus-laplace"))
        self.decoder = make_decoder(decoder, latents, shape, column_norm=(prod(shape) / max(latents, 1)) ** 0.5)
        self.likelihood = make_likelihood(likelihood or ("bernoulli" if multiplies == "logits" else "gaussian"))
        binary = isinstance(self.likelihood, Bernoulli)
        if (multiplies == "logits" and not binary) or (multiplies == "output" and binary):
            raise ProgramError('multiplies="logits" is the Bernoulli likelihood\'s name for what "output" is elsewhere')

    def forward(self, size: int) -> Tensor:
        with pyro.plate("data", size):
            scale = pyro.sample("scale", self.prior_of_scale())
            z = pyro.sample("z", self.prior())
            return pyro.sample("x", self.likelihood(self.scaled(scale, z)))

    def scaled(self, scale: Tensor, z: Tensor) -> Tensor:
        """The decoder's output under a scale `(size,)`: `(size, *shape)`."""
        if self.multiplies == "latents":
            return self.decoder(scale[:, None] * z)
        output = self.decoder(z)
        return scale.reshape(-1, *[1] * (output.dim() - 1)) * output

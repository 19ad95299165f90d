"""The explaining-away variational autoencoder: a VAE whose latents share a global scale."""

from __future__ import annotations

from math import prod
from typing import Any

import pyro
from pyro.nn import PyroModule
from torch import Tensor, nn

from calibrant.errors import ProgramError
from calibrant.models.parts.decoders import make_decoder
from calibrant.models.parts.ea_vae_presets import EA_VAE_PRESETS
from calibrant.models.parts.likelihoods.protocol import outputs_of, takes_logits
from calibrant.models.parts.likelihoods.registry import make_likelihood
from calibrant.models.parts.priors import named_scale_prior, vector_prior
from calibrant.models.registry import register_model
from calibrant.registries import Case

MULTIPLIES = ("latents", "output", "logits")
SMALL = {"shape": (1, 8, 8), "latents": 3}
IMAGE = {"x": (1, 8, 8)}
GAMMA = {"name": "gamma", "rate": 0.7}
FIXED_NOISE = {"name": "gaussian", "scale": 0.3, "learn": False}


@register_model(
    "ea-vae",
    paper="Catoni, Martos, Csikor, Ferrante, Milone, Meszéna, Orbán & Echeveste, arXiv 2404.15390",
    equations="s ~ LogNormal, Gamma or softplus-Laplace; x ~ likelihood(decoder(s·z)), or likelihood(s·decoder(z))",
    licence="Apache-2.0",
    cases=(
        Case(SMALL, IMAGE, is_exact=True, name="lognormal"),
        Case({**SMALL, "scale_prior": "gamma", "multiplies": "output"}, IMAGE, is_exact=True, name="gamma-output"),
        Case({**SMALL, "scale_prior": "softplus-laplace"}, IMAGE, is_exact=True, name="softplus-laplace"),
        Case({**SMALL, "likelihood": FIXED_NOISE}, IMAGE, is_exact=True, name="fixed-noise"),
        Case({**SMALL, "scale_prior": GAMMA, "prior": "laplace", "decoder": "mlp"}, IMAGE, name="laplace-mlp"),
        Case({**SMALL, "multiplies": "logits", "decoder": "conv"}, IMAGE, name="conv-logits"),
        Case({**SMALL, "multiplies": "output", "decoder": "conv", "prior": "laplace"}, IMAGE, name="conv-output"),
    ),
    presets=EA_VAE_PRESETS,
)
class EAVAE(PyroModule):
    """A VAE with a global scale, so that contrast and content explain each other away.

    Args:
        shape: event shape of `x`.
        latents: dimension of `z`.
        prior: prior of `z`: "normal" or "laplace", with location 0 and scale 1, or `{"name": …, "loc": …, "scale": …}`.
        decoder: "linear", "mlp", "conv", "sigma-vae" or "ea-vae-conv", `{"name": …, **arguments}`, or a module. The
            columns of the linear decoder have the fixed norm √(pixels/latents), so that the scale cannot be absorbed by
            the dictionary: under a prior of standard deviation 1, `scale` is the standard deviation of a pixel's
            signal. With `{"name": "linear", "column_norm": None}` they are free.
        scale_prior: "lognormal", "gamma" or "softplus-laplace", or `{"name": …, **parameters}`.
        multiplies: what the scale multiplies: the "latents", the decoder's "output" (its bias too), or the "logits"
            of a likelihood that takes them, such as Bernoulli (scale 0 is then mid-grey, not blank). If the decoder has
            several outputs, only the first is multiplied.
        likelihood: a name of `list_likelihoods()`, `{"name": …, **arguments}`, or a module. The default is "gaussian",
            with a learned scale that all entries share, or "bernoulli" if the scale multiplies the logits.
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
        likelihood = likelihood or ("bernoulli" if multiplies == "logits" else "gaussian")
        noise = make_likelihood(likelihood, tuple(shape))
        if multiplies != "latents" and (multiplies == "logits") != takes_logits(noise, tuple(shape)):
            raise ProgramError(
                f'multiplies={multiplies!r} does not fit {type(noise).__name__}: write multiplies="logits" where the '
                'likelihood takes logits, and multiplies="output" elsewhere'
            )
        outputs, norm = outputs_of(noise, tuple(shape)), (prod(shape) / max(latents, 1)) ** 0.5
        self.decoder = make_decoder(decoder, latents, outputs, column_norm=norm)
        self.likelihood = noise

    def forward(self, size: int) -> Tensor:
        with pyro.plate("data", size):
            scale = pyro.sample("scale", self.prior_of_scale())
            z = pyro.sample("z", self.prior())
            return pyro.sample("x", self.likelihood(self.scaled(scale, z)))

    def scaled(self, scale: Tensor, z: Tensor) -> Any:
        """The input of the likelihood, given a scale `(size,)` and latents `(size, latents)`."""
        if self.multiplies == "latents":
            return self.decoder(scale[:, None] * z)
        output = self.decoder(z)
        first, *others = output if isinstance(output, tuple) else (output,)
        first = scale.reshape(-1, *[1] * (first.dim() - 1)) * first
        return (first, *others) if others else first

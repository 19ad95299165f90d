"""What a model declares so that its posterior can be had exactly. `inference.exact` solves it, after a check against
the program's own density."""

from __future__ import annotations

from dataclasses import dataclass

import pyro.distributions as dist
from torch import Tensor, nn

from calibrant.models.likelihoods import Gaussian
from calibrant.models.networks import LinearDecoder


@dataclass(frozen=True)
class LinearGaussian:
    """x = offset + s·(shift + loading·z) + ε with z ~ N(0, covariance), ε ~ N(0, diag(noise²)), s ~ scale_prior or s = 1.

    Pixels are the flattened event of `x`.

    Attributes:
        observed: the observed site x.
        latent: the Gaussian vector site z, event shape `(k,)`.
        loading: `(pixels, k)`.
        noise: standard deviation of ε: `()`, or the event shape of x.
        offset: `(pixels,)`, or None for zero.
        shift: `(pixels,)`, or None for zero.
        covariance: `(k, k)`, or None for the identity.
        scale: the scalar site s, or None where there is no scale.
        scale_prior: its prior, on positive numbers.
    """

    observed: str
    latent: str
    loading: Tensor
    noise: Tensor
    offset: Tensor | None = None
    shift: Tensor | None = None
    covariance: Tensor | None = None
    scale: str | None = None
    scale_prior: dist.Distribution | None = None


def is_linear_gaussian(decoder: nn.Module, likelihood: nn.Module, prior: str) -> bool:
    """Whether a linear decoder, a Gaussian likelihood and a Normal prior meet."""
    return isinstance(decoder, LinearDecoder) and isinstance(likelihood, Gaussian) and prior == "normal"

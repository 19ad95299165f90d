"""What a model declares so that its posterior can be had exactly. `inference.exact` solves it, after a check against
the program's own density."""

from __future__ import annotations

from dataclasses import dataclass

import pyro.distributions as dist
from torch import Tensor, nn

from calibrant.errors import InferenceError
from calibrant.models.likelihoods import Gaussian
from calibrant.models.networks import LinearDecoder


@dataclass(frozen=True, eq=False)
class LinearGaussian:
    """x = offset + s·(shift + loading·z) + ε, z ~ N(0, covariance), ε ~ N(0, diag(noise²)), s ~ scale_prior or s = 1.

    Pixels are the flattened event of `x`; the tensors other than `loading` may have the event's shape.

    Args:
        observed: the observed site x.
        latent: the Gaussian vector site z, event shape `(k,)`.
        loading: `(pixels, k)`.
        noise: standard deviation of ε: `()`, or one a pixel.
        offset: `(pixels,)`, added whatever the scale; None is zero.
        shift: `(pixels,)`, added times the scale; None is zero.
        covariance: `(k, k)`, may be singular; None is the identity.
        scale: the scalar site s, or None where there is no scale.
        scale_prior: its prior, on positive numbers, the same for every datum.

    Raises:
        InferenceError: for shapes that do not fit together, a scale without a prior or a prior without a scale.
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

    def __post_init__(self) -> None:
        if self.loading.dim() != 2:
            raise InferenceError(f"loading has shape {tuple(self.loading.shape)}; give a matrix (pixels, k)")
        pixels, latents = self.loading.shape
        sizes = {"noise": (1, pixels), "offset": (pixels,), "shift": (pixels,)}
        for name, allowed in sizes.items():
            value = getattr(self, name)
            if value is not None and value.numel() not in allowed:
                raise InferenceError(f"{name} has shape {tuple(value.shape)}; this loading has {pixels} pixels")
        if self.covariance is not None and self.covariance.shape != (latents, latents):
            raise InferenceError(f"covariance has shape {tuple(self.covariance.shape)}; wanted ({latents}, {latents})")
        if (self.scale is None) != (self.scale_prior is None):
            raise InferenceError("name the site of the scale and give its prior (scale, scale_prior), or neither")


def is_linear_gaussian(decoder: nn.Module, likelihood: nn.Module, prior: str) -> bool:
    """Whether a linear decoder, a Gaussian likelihood and a Normal prior meet."""
    return isinstance(decoder, LinearDecoder) and isinstance(likelihood, Gaussian) and prior == "normal"

"""The parameters of a program that is linear and Gaussian except for one scale.

`linear_gaussian.detection.detect` finds them, and `inference.references.exact.solve` computes the posterior from them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor
from torch.distributions import Distribution

from calibrant.errors import InferenceError

Shapes = Mapping[str, tuple[int, ...]]


@dataclass(frozen=True, eq=False)
class LinearGaussian:
    """x = offset + s·(shift + loading·z) + ε, z ~ N(mean, covariance), ε ~ N(0, diag(noise²)), s ~ scale_prior or 1.

    z is the vector of all Gaussian latents, flattened and concatenated ("the block"). Pixels are the flattened event of
    `x`; noise, offset and shift may have the shape of the event.

    Args:
        observed: the observed site x.
        latents: the sites of the block in order, with their event shapes; they have k entries in all.
        loading: matrix `(pixels, k)`.
        noise: standard deviation of ε, `()` or one per pixel.
        offset: `(pixels,)`, the part that the scale does not multiply; None is zero.
        shift: `(pixels,)`, the constant part that the scale multiplies; None is zero.
        mean: prior mean of z, `(k,)`; None is zero.
        covariance: prior covariance of z, `(k, k)`, may be singular; None is the identity.
        scale: name of the scalar site s, or None if there is no scale.
        scale_prior: prior of s, on positive numbers and the same for every datum.

    Raises:
        InferenceError: for shapes that do not match, a scale without a prior or a prior without a scale.
    """

    observed: str
    latents: Shapes
    loading: Tensor
    noise: Tensor
    offset: Tensor | None = None
    shift: Tensor | None = None
    mean: Tensor | None = None
    covariance: Tensor | None = None
    scale: str | None = None
    scale_prior: Distribution | None = None

    def __post_init__(self) -> None:
        if self.loading.dim() != 2:
            raise InferenceError(f"loading has shape {tuple(self.loading.shape)}; give a matrix (pixels, k)")
        pixels, entries = self.loading.shape
        if sum(map(prod, self.latents.values())) != entries:
            raise InferenceError(f"loading has {entries} columns; the latents are {dict(self.latents)}")
        sizes = {"noise": (1, pixels), "offset": (pixels,), "shift": (pixels,)}
        for name, allowed in sizes.items():
            value = getattr(self, name)
            if value is not None and value.numel() not in allowed:
                raise InferenceError(f"{name} has shape {tuple(value.shape)}; this loading has {pixels} pixels")
        for name, wanted in {"mean": (entries,), "covariance": (entries, entries)}.items():
            value = getattr(self, name)
            if value is not None and value.shape != wanted:
                raise InferenceError(f"{name} has shape {tuple(value.shape)}; wanted {wanted}")
        if (self.scale is None) != (self.scale_prior is None):
            raise InferenceError("name the site of the scale and give its prior (scale, scale_prior), or neither")


def join(values: Mapping[str, Tensor], shapes: Shapes) -> Tensor:
    """Concatenate the values `(size, *event)` of the sites to the block `(size, k)`."""
    return torch.cat([values[name].reshape(len(values[name]), -1) for name in shapes], -1)


def split(block: Tensor, shapes: Shapes) -> dict[str, Tensor]:
    """Split a block `(*batch, k)` into the values `(*batch, *event)` of its sites."""
    parts = block.split([prod(shape) for shape in shapes.values()], -1)
    return {name: part.reshape(*block.shape[:-1], *shapes[name]) for name, part in zip(shapes, parts, strict=True)}

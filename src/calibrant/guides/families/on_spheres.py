"""Families of angles and of points on spheres."""

from __future__ import annotations

from abc import abstractmethod

import pyro.distributions as dist
import torch
from torch import Tensor
from torch.nn.functional import normalize

from calibrant.distributions.directional import VonMises, VonMisesFisher
from calibrant.guides.families.densities import Family, softplus_scale


class Directional(Family):
    """A family of directions in ℝᵖ; values on the line are the unit vectors themselves.

    The scale of the prior is the sd of a tangential entry, √(2(1 − R)/(p − 1)) for mean resultant length R; the scale
    of the guide is 1/√κ.
    """

    def __init__(self, event_shape: tuple[int, ...], dimension: int) -> None:
        super().__init__(event_shape)
        self.vectors, self.dimension = self.vector_shape(), dimension
        self.locations = self.width_on_line = self.vectors.numel() * dimension
        self.raw = self.locations + self.vectors.numel()

    @abstractmethod
    def vector_shape(self) -> torch.Size:
        """Shape of the array of vectors in the value of one datum."""

    @abstractmethod
    def to_vectors(self, value: Tensor) -> Tensor:
        """Convert values `(n, *event_shape)` to unit vectors `(n, *vector_shape, p)`."""

    def start(self) -> tuple[Tensor, Tensor]:
        center = torch.zeros(*self.vectors, self.dimension)
        center[..., 0] = 1
        return center, torch.full(self.vectors, (2 / (self.dimension - 1)) ** 0.5)

    def statistics(self, draws: Tensor) -> tuple[Tensor, Tensor]:
        mean = self.to_vectors(draws).double().mean(0)
        width = (2 * (1 - mean.norm(dim=-1)).clamp_min(1e-6) / (self.dimension - 1)).sqrt()
        return normalize(mean, dim=-1), width

    def standardize(self, value: Tensor, center: Tensor, width: Tensor) -> Tensor:
        length = 1 - width.square() * (self.dimension - 1) / 2
        return ((self.to_vectors(value) - length[..., None] * center) / width[..., None]).reshape(len(value), -1)

    def directed(self, raw: Tensor, center: Tensor, width: Tensor) -> tuple[Tensor, Tensor]:
        """Mean directions `(size, *vector_shape, p)` and concentrations."""
        loc = raw[:, : self.locations].reshape(-1, *self.vectors, self.dimension)
        scale = width * softplus_scale(raw[:, self.locations :].reshape(-1, *self.vectors))
        return normalize(center + width[..., None] * loc, dim=-1), scale.clamp(3e-3, 30.0).pow(-2)


class Circle(Directional):
    """Von Mises distributions of angles."""

    def __init__(self, event_shape: tuple[int, ...]) -> None:
        super().__init__(event_shape, 2)

    def vector_shape(self) -> torch.Size:
        return self.event_shape

    def to_vectors(self, value: Tensor) -> Tensor:
        return torch.stack([value.cos(), value.sin()], -1)

    def build(self, raw: Tensor, center: Tensor, width: Tensor) -> dist.TorchDistribution:
        direction, concentration = self.directed(raw, center, width)
        angle = torch.atan2(direction[..., 1], direction[..., 0])
        return VonMises(angle, concentration).to_event(len(self.event_shape))


class Sphere(Directional):
    """Von Mises–Fisher distributions of unit vectors."""

    def __init__(self, event_shape: tuple[int, ...]) -> None:
        super().__init__(event_shape, event_shape[-1])

    def vector_shape(self) -> torch.Size:
        return self.event_shape[:-1]

    def to_vectors(self, value: Tensor) -> Tensor:
        return value

    def build(self, raw: Tensor, center: Tensor, width: Tensor) -> dist.TorchDistribution:
        return VonMisesFisher(*self.directed(raw, center, width)).to_event(len(self.vectors))

"""Parts of encoders."""

from __future__ import annotations

from collections.abc import Mapping
from math import prod

import torch
from torch import Tensor, nn

Shapes = Mapping[str, tuple[int, ...]]


class Standardize(nn.Module):
    """Joins all inputs of a datum to one vector, and standardises it by statistics of the data.

    Returns `(vector, direction)`: the vector itself, `(size, entries)`, in standard deviations of the data; and the
    vector divided by its root mean square, with the log of this root mean square (the contrast of an image) as one more
    entry.
    """

    loc: Tensor
    scale: Tensor

    def __init__(self, shapes: Shapes) -> None:
        super().__init__()
        self.names = list(shapes)
        entries = sum(prod(shape) for shape in shapes.values())
        self.entries = entries
        self.register_buffer("loc", torch.zeros(entries))
        self.register_buffer("scale", torch.ones(()))

    @torch.no_grad()
    def set_statistics(self, inputs: Mapping[str, Tensor]) -> None:
        """Store the mean of each entry, and one scale for all entries, so that pixels keep their proportions."""
        joined = self._join(inputs).double()
        self.loc.copy_(joined.mean(0))
        scale = (joined - joined.mean(0)).pow(2).mean().sqrt()
        self.scale.copy_(scale if scale > 0 else torch.ones_like(scale))  # for one datum, or equal data

    def forward(self, inputs: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        vector = (self._join(inputs) - self.loc) / self.scale
        contrast = (vector.pow(2).mean(-1, keepdim=True) + 1e-6).sqrt()
        return vector, torch.cat([vector / contrast, contrast.log()], -1)

    def _join(self, inputs: Mapping[str, Tensor]) -> Tensor:
        return torch.cat([inputs[name].reshape(len(inputs[name]), -1).to(self.loc.dtype) for name in self.names], -1)


class LinearPaths(nn.Module):
    """Features that are linear in the vector (if `vector` is True) or in its direction, `features` in all.

    The exact posterior mean under a linear decoder is linear in the image; if there is a scale, it is linear in the
    image times a function of the contrast. The scale itself is not linear: its logarithm follows that of the contrast.
    """

    def __init__(self, entries: int, features: int, vector: bool = True) -> None:
        super().__init__()
        own = features // 2 if vector else 0
        self.vector = nn.Linear(entries, own) if vector else None
        self.direction = nn.Linear(entries + 1, features - own)

    def forward(self, vector: Tensor, direction: Tensor) -> Tensor:
        if self.vector is None:
            return self.direction(direction)
        return torch.cat([self.vector(vector), self.direction(direction)], -1)


class Energies(nn.Module):
    """A direction, joined with squares of learned projections of it: the power of the image in parts of pixel space.

    The posterior of the scale of a Gaussian scale mixture depends on such powers, which an MLP could only approximate.
    """

    def __init__(self, entries: int, count: int = 128) -> None:
        super().__init__()
        self.projections = nn.Linear(entries + 1, count)
        self.features = entries + 1 + count

    def forward(self, direction: Tensor) -> Tensor:
        return torch.cat([direction, self.projections(direction).square()], -1)


class Residual(nn.Module):
    """A residual block: the identity plus two normalised convolutions; at first, it is nearly the identity.

    Groups of 8 channels are normalised datum by datum. This removes the contrast of an image, which reaches the
    features by another path.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        last = nn.Conv2d(channels, channels, 3, padding=1)
        with torch.no_grad():
            last.weight.mul_(0.1)
        self.network = nn.Sequential(
            nn.GroupNorm(channels // 8, channels),
            nn.SiLU(),
            nn.Conv2d(channels, channels, 3, padding=1),
            nn.GroupNorm(channels // 8, channels),
            nn.SiLU(),
            last,
        )

    def forward(self, maps: Tensor) -> Tensor:
        return maps + self.network(maps)


def block_side(shape: tuple[int, ...], most: int = 4096) -> int:
    """The smallest side of blocks, a power of 2, whose means leave at most `most` entries of an image."""
    block = 1
    while block < max(shape[1:]) and shape[0] * prod(-(-side // block) for side in shape[1:]) > most:
        block *= 2
    return block

"""Encoders: observations and covariates of a datum → features `(size, features)`."""

from __future__ import annotations

from collections.abc import Mapping
from math import prod

import torch
from torch import Tensor, nn

from calibrant.errors import ProgramError

Shapes = Mapping[str, tuple[int, ...]]


class Standardize(nn.Module):
    """All inputs of a datum, standardised by statistics of the data and joined to one vector.

    Returns `(vector, direction)`: the vector itself, `(size, entries)`, in standard deviations of the data; and the
    vector divided by its root mean square, with the log of that (the contrast of an image) as one more entry.
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
        """Take the mean of each entry, and one scale for all (an image's pixels keep their proportions)."""
        joined = self._join(inputs).double()
        self.loc.copy_(joined.mean(0))
        scale = (joined - joined.mean(0)).pow(2).mean().sqrt()
        self.scale.copy_(scale if scale > 0 else torch.ones_like(scale))  # one datum, or all alike

    def forward(self, inputs: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        vector = (self._join(inputs) - self.loc) / self.scale
        contrast = (vector.pow(2).mean(-1, keepdim=True) + 1e-6).sqrt()
        return vector, torch.cat([vector / contrast, contrast.log()], -1)

    def _join(self, inputs: Mapping[str, Tensor]) -> Tensor:
        return torch.cat([inputs[name].reshape(len(inputs[name]), -1).to(self.loc.dtype) for name in self.names], -1)


class LinearPaths(nn.Module):
    """Linear features of the vector and of its direction, `features` in all.

    The exact posterior mean of a linear decoder is linear in the image; under a scale, it is that times a function of
    the contrast.
    """

    def __init__(self, entries: int, features: int) -> None:
        super().__init__()
        self.vector = nn.Linear(entries, features // 2)
        self.direction = nn.Linear(entries + 1, features - features // 2)

    def forward(self, vector: Tensor, direction: Tensor) -> Tensor:
        return torch.cat([self.vector(vector), self.direction(direction)], -1)


class Energies(nn.Module):
    """A direction, joined with the squares of some of its projections: the image's power in parts of pixel space.

    The scale of a Gaussian scale mixture is read off such powers, which an MLP would have to approximate.
    """

    def __init__(self, entries: int, count: int = 128) -> None:
        super().__init__()
        self.projections = nn.Linear(entries + 1, count)
        self.features = entries + 1 + count

    def forward(self, direction: Tensor) -> Tensor:
        return torch.cat([direction, self.projections(direction).square()], -1)


class MLPEncoder(nn.Module):
    """Two hidden layers with SiLU on direction and energies, beside linear paths: half of the features each."""

    def __init__(self, shapes: Shapes, hidden: int = 256) -> None:
        super().__init__()
        self.inputs = Standardize(shapes)
        energies = Energies(self.inputs.entries)
        self.network = nn.Sequential(
            energies, nn.Linear(energies.features, hidden), nn.SiLU(), nn.Linear(hidden, hidden), nn.SiLU()
        )
        self.linear = LinearPaths(self.inputs.entries, hidden)
        self.features = 2 * hidden

    def forward(self, inputs: Mapping[str, Tensor]) -> Tensor:
        vector, direction = self.inputs(inputs)
        return torch.cat([self.network(direction), self.linear(vector, direction)], -1)


class ConvEncoder(nn.Module):
    """Two convolutions of stride 2 on one image, beside the energies and linear paths of `MLPEncoder`."""

    def __init__(self, shapes: Shapes, channels: int = 32, hidden: int = 256) -> None:
        super().__init__()
        images = [name for name, shape in shapes.items() if len(shape) == 3]
        if len(images) != 1 or min(shapes[images[0]][1:]) < 4:
            raise ProgramError(
                "the convolutional encoder takes one image (channels, height, width) of 4 pixels or more, not "
                f'{dict(shapes)}: use encoder="mlp"'
            )
        self.image, (depth, height, width) = images[0], shapes[images[0]]
        self.inputs = Standardize(shapes)
        self.convolutions = nn.Sequential(
            nn.Conv2d(depth, channels, 4, stride=2, padding=1),
            nn.SiLU(),
            nn.Conv2d(channels, 2 * channels, 4, stride=2, padding=1),
            nn.SiLU(),
            nn.Flatten(),
        )
        flat = 2 * channels * (height // 4) * (width // 4)
        self.energies = Energies(self.inputs.entries)
        self.network = nn.Sequential(nn.Linear(flat + self.energies.features, hidden), nn.SiLU())
        self.linear = LinearPaths(self.inputs.entries, hidden)
        self.features = 2 * hidden

    def forward(self, inputs: Mapping[str, Tensor]) -> Tensor:
        vector, direction = self.inputs(inputs)
        image = inputs[self.image].to(vector.dtype) / self.inputs.scale
        seen = self.network(torch.cat([self.convolutions(image), self.energies(direction)], -1))
        return torch.cat([seen, self.linear(vector, direction)], -1)


ENCODERS: dict[str, type[nn.Module]] = {"mlp": MLPEncoder, "conv": ConvEncoder}


def default_encoder(shapes: Shapes) -> str:
    """Convolutions for one image beyond 32×32 pixels, else an MLP."""
    images = [shape for shape in shapes.values() if len(shape) == 3]
    return "conv" if len(images) == 1 and prod(images[0]) > 1024 else "mlp"

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

    One entry is added: the log of the root mean square of the standardised inputs, the contrast of an image. Units
    are standard deviations of the data.
    """

    loc: Tensor
    scale: Tensor

    def __init__(self, shapes: Shapes) -> None:
        super().__init__()
        self.names = list(shapes)
        entries = sum(prod(shape) for shape in shapes.values())
        self.features = entries + 1
        self.register_buffer("loc", torch.zeros(entries))
        self.register_buffer("scale", torch.ones(()))

    @torch.no_grad()
    def set_statistics(self, inputs: Mapping[str, Tensor]) -> None:
        """Take the mean of each entry, and one scale for all (an image's pixels keep their proportions)."""
        joined = self._join(inputs).double()
        self.loc.copy_(joined.mean(0))
        self.scale.copy_((joined - joined.mean(0)).pow(2).mean().sqrt().clamp(min=1e-6))

    def forward(self, inputs: Mapping[str, Tensor]) -> Tensor:
        vector = (self._join(inputs) - self.loc) / self.scale
        contrast = vector.pow(2).mean(-1, keepdim=True).clamp(min=1e-12).log() / 2
        return torch.cat([vector, contrast], -1)

    def _join(self, inputs: Mapping[str, Tensor]) -> Tensor:
        return torch.cat([inputs[name].reshape(len(inputs[name]), -1).to(self.loc.dtype) for name in self.names], -1)


class MLPEncoder(nn.Module):
    """Two hidden layers with SiLU, beside a linear path: half of the features each."""

    def __init__(self, shapes: Shapes, hidden: int = 256) -> None:
        super().__init__()
        self.inputs = Standardize(shapes)
        self.network = nn.Sequential(
            nn.Linear(self.inputs.features, hidden),
            nn.SiLU(),
            nn.Linear(hidden, hidden),
            nn.SiLU(),
        )
        self.linear = nn.Linear(self.inputs.features, hidden)
        self.features = 2 * hidden

    def forward(self, inputs: Mapping[str, Tensor]) -> Tensor:
        vector = self.inputs(inputs)
        return torch.cat([self.network(vector), self.linear(vector)], -1)


class ConvEncoder(nn.Module):
    """Two convolutions of stride 2 on one image, beside the linear path of `MLPEncoder`."""

    def __init__(self, shapes: Shapes, channels: int = 32, hidden: int = 256) -> None:
        super().__init__()
        images = [name for name, shape in shapes.items() if len(shape) == 3]
        if len(images) != 1 or min(shapes[images[0]][1:]) < 4:
            raise ProgramError(
                f"the convolutional encoder takes one image (channels, height, width) of 4 pixels or more, not {dict(shapes)}: "
                'use encoder="mlp"'
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
        self.network = nn.Sequential(nn.Linear(flat + self.inputs.features, hidden), nn.SiLU())
        self.linear = nn.Linear(self.inputs.features, hidden)
        self.features = 2 * hidden

    def forward(self, inputs: Mapping[str, Tensor]) -> Tensor:
        vector = self.inputs(inputs)
        image = inputs[self.image].to(vector.dtype) / self.inputs.scale
        seen = self.network(torch.cat([self.convolutions(image), vector], -1))
        return torch.cat([seen, self.linear(vector)], -1)


ENCODERS: dict[str, type[nn.Module]] = {"mlp": MLPEncoder, "conv": ConvEncoder}


def default_encoder(shapes: Shapes) -> str:
    """Convolutions for one image beyond 32×32 pixels, else an MLP."""
    images = [shape for shape in shapes.values() if len(shape) == 3]
    return "conv" if len(images) == 1 and prod(images[0]) > 1024 else "mlp"

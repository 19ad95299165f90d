"""Encoders of vectors and images."""

from __future__ import annotations

from collections.abc import Mapping
from math import prod

import torch
from torch import Tensor, nn
from torch.nn.functional import avg_pool2d

from calibrant.errors import ProgramError
from calibrant.guides.encoders.layers import Energies, LinearPaths, Residual, Shapes, Standardize, block_side


class MLPEncoder(nn.Module):
    """An encoder with two hidden layers of SiLU units on direction and energies, and with linear features.

    Half of the features come from each of the two parts.

    Args:
        shapes: shapes of the inputs, which are joined to one vector.
        hidden: half of the number of features.
        vector: whether some features are linear in the input itself; otherwise, linear features see only its direction
            and log contrast.
    """

    def __init__(self, shapes: Shapes, hidden: int = 256, vector: bool = True) -> None:
        super().__init__()
        self.inputs = Standardize(shapes)
        energies = Energies(self.inputs.entries)
        self.network = nn.Sequential(
            energies, nn.Linear(energies.features, hidden), nn.SiLU(), nn.Linear(hidden, hidden), nn.SiLU()
        )
        self.linear = LinearPaths(self.inputs.entries, hidden, vector)
        self.features = 2 * hidden

    def forward(self, inputs: Mapping[str, Tensor]) -> Tensor:
        vector, direction = self.inputs(inputs)
        return torch.cat([self.network(direction), self.linear(vector, direction)], -1)


class ConvEncoder(nn.Module):
    """An encoder with residual convolutions on the direction of an image, and the energies and linear features of
    `MLPEncoder`.

    A first layer has stride 1, 2 or 4; residual blocks follow, each at half the resolution of the one before, down to a
    map of 4×4 or less, which is flattened. Energies and linear features are computed from the image itself or, if it
    has more than 4,096 entries, from its means over blocks of pixels.

    Args:
        shapes: shape of one image, (channels, height, width), of any size.
        channels: number of maps of the first layer, a multiple of 8; it is doubled at each halving, up to 128.
        hidden: half of the number of features.
        vector: whether some features are linear in the image itself; otherwise, linear features see only its direction
            and log contrast.
    """

    def __init__(self, shapes: Shapes, channels: int = 32, hidden: int = 256, vector: bool = True) -> None:
        super().__init__()
        if len(shapes) != 1 or any(len(shape) != 3 for shape in shapes.values()):
            raise ProgramError(f"a convolutional encoder takes one image (channels, height, width), not {dict(shapes)}")
        if channels < 8 or channels % 8:
            raise ProgramError(f"channels={channels} of a convolutional encoder: give a multiple of 8")
        (self.shape,) = shapes.values()
        self.inputs, self.block = Standardize(shapes), block_side(self.shape)
        self.convolutions, flat = _convolutions(self.shape, channels)
        coarse = self.shape[0] * prod(-(-side // self.block) for side in self.shape[1:])
        self.energies = Energies(coarse)
        self.network = nn.Sequential(nn.Linear(flat + self.energies.features, hidden), nn.SiLU())
        self.linear = LinearPaths(coarse, hidden, vector)
        self.features = 2 * hidden

    def forward(self, inputs: Mapping[str, Tensor]) -> Tensor:
        vector, direction = self.inputs(inputs)
        image, contrast = direction[:, :-1].reshape(-1, *self.shape), direction[:, -1:]
        vector, direction = self._coarse(vector), torch.cat([self._coarse(image), contrast], -1)
        seen = self.network(torch.cat([self.convolutions(image), self.energies(direction)], -1))
        return torch.cat([seen, self.linear(vector, direction)], -1)

    def _coarse(self, image: Tensor) -> Tensor:
        """Means over blocks of pixels, `(size, entries)`."""
        sides = [min(self.block, side) for side in self.shape[1:]]
        return avg_pool2d(image.reshape(-1, *self.shape), sides, ceil_mode=True).flatten(1)


class SigmaVAEEncoder(nn.Module):
    """The encoder of the small network of the σ-VAE (Rybkin, Daniilidis & Levine 2021, arXiv 2006.13202, appendix B).

    Three convolutions of the image as it is, with ReLU, of which the second and third halve its sides.

    Args:
        shapes: shape of one image, (channels, height, width).
        width: number of maps of the first layer, which is doubled by each of the others; 32 in the paper.
    """

    def __init__(self, shapes: Shapes, width: int = 32) -> None:
        if len(shapes) != 1 or any(len(shape) != 3 or min(shape[1:]) < 2 for shape in shapes.values()):
            raise ProgramError(
                "the encoder 'sigma-vae' takes one image (channels, height, width) of at least 2×2 pixels, not "
                f"{dict(shapes)}"
            )
        if not (isinstance(width, int) and width > 0):
            raise ProgramError(f"width={width!r} of the encoder 'sigma-vae': give a whole number above 0")
        ((name, (channels, height, columns)),) = shapes.items()
        super().__init__()
        self.network = nn.Sequential(
            nn.Conv2d(channels, width, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(width, 2 * width, 4, stride=2, padding=1),
            nn.ReLU(),
            nn.Conv2d(2 * width, 4 * width, 5, stride=2, padding=2),
            nn.ReLU(),
            nn.Flatten(),
        )
        self.name, self.features = name, 4 * width * ((height // 2 + 1) // 2) * ((columns // 2 + 1) // 2)

    def forward(self, inputs: Mapping[str, Tensor]) -> Tensor:
        image = inputs[self.name]
        return self.network(image.to(next(self.network.parameters()).dtype))


def _convolutions(shape: tuple[int, ...], channels: int) -> tuple[nn.Sequential, int]:
    """The convolutional layers, and the number of their outputs."""
    stride = next((s for s in (1, 2) if max(shape[1:]) <= 16 * s), 4)
    sides = [-(-side // stride) for side in shape[1:]]
    first = nn.Conv2d(shape[0], channels, 2 * stride + 1, stride, padding=stride)
    layers: list[nn.Module] = [first, Residual(channels)]
    while max(sides) > 4:
        wider = max(channels, min(2 * channels, 128))
        layers += [nn.Conv2d(channels, wider, 3, 2, padding=1), Residual(wider)]
        channels, sides = wider, [-(-side // 2) for side in sides]
    return nn.Sequential(*layers, nn.SiLU(), nn.Flatten()), channels * prod(sides)

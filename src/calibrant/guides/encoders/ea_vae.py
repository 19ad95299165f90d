"""The encoders of the EA-VAE (Catoni et al. 2024, arXiv 2404.15390), from its code.

Both see the inputs as they are, and may have features of their own for scalar latents: softplus units that branch off
behind the first layer (`for_scalars` of them, the last ones). Scalar latents then see these features, and all other
latents see the rest.
"""

from __future__ import annotations

from collections.abc import Mapping
from math import prod

import torch
from torch import Tensor, nn

from calibrant.errors import ProgramError
from calibrant.guides.encoders.layers import Shapes


class _Branched(nn.Module):
    """A first layer, the rest of a network, and the branch of scalar latents between them.

    Args:
        first: the first layer, with its activation.
        between: number of outputs of the first layer.
        rest: the layers behind it.
        features: number of their outputs.
        scalars: number of features of scalar latents; 0 for none of their own.
    """

    def __init__(self, first: nn.Module, between: int, rest: nn.Module, features: int, scalars: int) -> None:
        if type(scalars) is not int or scalars < 0:
            raise ProgramError(f"scalars={scalars!r} of an encoder of the EA-VAE: give a whole number, 0 or more")
        super().__init__()
        self.first, self.rest = first, rest
        self.branch = nn.Sequential(nn.Flatten(), nn.Linear(between, scalars), nn.Softplus()) if scalars else None
        self.features, self.for_scalars = features + scalars, scalars

    def encoded(self, value: Tensor) -> Tensor:
        """The features, `(size, features)`."""
        between = self.first(value)
        seen = self.rest(between)
        return seen if self.branch is None else torch.cat([seen, self.branch(between)], -1)


class EAVAEMLPEncoder(_Branched):
    """Two hidden layers of softplus units, as for natural images.

    Args:
        shapes: shapes of the inputs, which are joined to one vector.
        hidden: number of units of a layer; 2,000 in the paper, for 1,600 pixels.
        scalars: number of features of scalar latents, from the first hidden layer; 20 in the paper's EA-VAE for van
            Hateren's images, and 0 for none of their own.
    """

    def __init__(self, shapes: Shapes, hidden: int = 2000, scalars: int = 0) -> None:
        if type(hidden) is not int or hidden < 1:
            raise ProgramError(f"hidden={hidden!r} of the encoder 'ea-vae-mlp': give a whole number above 0")
        entries = sum(prod(shape) for shape in shapes.values())
        first = nn.Sequential(nn.Linear(entries, hidden), nn.Softplus())
        super().__init__(first, hidden, nn.Sequential(nn.Linear(hidden, hidden), nn.Softplus()), hidden, scalars)
        self.names = list(shapes)

    def forward(self, inputs: Mapping[str, Tensor]) -> Tensor:
        dtype = next(self.parameters()).dtype
        parts = [inputs[name].reshape(len(inputs[name]), -1).to(dtype) for name in self.names]
        return self.encoded(torch.cat(parts, -1))


class EAVAEConvEncoder(_Branched):
    """Three convolutions of stride 2 with ReLU, as for MNIST.

    Args:
        shapes: shape of one image, (channels, height, width), with sides of at least 8 pixels.
        width: number of maps of the first layer, which is doubled by each of the others; 64 in the paper.
        scalars: number of features of scalar latents, from the first layer; 20 in the paper's EA-VAE, and 0 for none of
            their own.
    """

    def __init__(self, shapes: Shapes, width: int = 64, scalars: int = 0) -> None:
        if len(shapes) != 1 or any(len(shape) != 3 or min(shape[1:]) < 8 for shape in shapes.values()):
            raise ProgramError(
                "the encoder 'ea-vae-conv' takes one image (channels, height, width) of at least 8×8 pixels, not "
                f"{dict(shapes)}"
            )
        if type(width) is not int or width < 1:
            raise ProgramError(f"width={width!r} of the encoder 'ea-vae-conv': give a whole number above 0")
        ((name, (channels, height, columns)),) = shapes.items()
        first = nn.Sequential(nn.Conv2d(channels, width, 4, stride=2, padding=1), nn.ReLU())
        rest = nn.Sequential(
            nn.Conv2d(width, 2 * width, 4, stride=2, padding=1),
            nn.ReLU(),
            nn.Conv2d(2 * width, 4 * width, 4, stride=2, padding=1),
            nn.ReLU(),
            nn.Flatten(),
        )
        between = width * (height // 2) * (columns // 2)
        super().__init__(first, between, rest, 4 * width * (height // 8) * (columns // 8), scalars)
        self.name = name

    def forward(self, inputs: Mapping[str, Tensor]) -> Tensor:
        return self.encoded(inputs[self.name].to(next(self.parameters()).dtype))

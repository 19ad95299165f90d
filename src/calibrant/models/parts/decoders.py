"""Decoders: modules that map latents `(size, latents)` to the input of a likelihood.

That is a tensor `(size, *shape)` for a likelihood with one output, and a tuple of tensors for one with several.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import prod

import torch
from torch import Tensor, nn

from calibrant.errors import ProgramError


class LinearDecoder(nn.Module):
    """The affine map `W z + b`.

    Args:
        latents: number of latents.
        shape: event shape of the output.
        column_norm: fixed norm of every column of W; None for columns of any norm.
        bias: whether there is a bias b.
    """

    def __init__(
        self, latents: int, shape: tuple[int, ...], column_norm: float | None = None, bias: bool = True
    ) -> None:
        super().__init__()
        self.shape, self.column_norm = tuple(shape), column_norm
        self.directions = nn.Parameter(torch.randn(prod(shape), latents) / latents**0.5)
        self.bias = nn.Parameter(torch.zeros(prod(shape))) if bias else None

    @property
    def weight(self) -> Tensor:
        """W, `(pixels, latents)`."""
        if self.column_norm is None:
            return self.directions
        return self.column_norm * nn.functional.normalize(self.directions, dim=0)

    def forward(self, latents: Tensor) -> Tensor:
        return nn.functional.linear(latents, self.weight, self.bias).reshape(-1, *self.shape)


class MLPDecoder(nn.Sequential):
    """A multilayer perceptron with two hidden layers and SiLU activations."""

    def __init__(self, latents: int, shape: tuple[int, ...], hidden: int = 256) -> None:
        super().__init__(
            nn.Linear(latents, hidden),
            nn.SiLU(),
            nn.Linear(hidden, hidden),
            nn.SiLU(),
            nn.Linear(hidden, prod(shape)),
            nn.Unflatten(1, tuple(shape)),
        )


class ConvDecoder(nn.Sequential):
    """Two transposed convolutions of stride 2, for images whose sides are multiples of 4."""

    def __init__(self, latents: int, shape: tuple[int, ...], channels: int = 32) -> None:
        if len(shape) != 3 or shape[1] % 4 or shape[2] % 4:
            raise ProgramError(f"a convolutional decoder needs shape (channels, 4h, 4w), not {tuple(shape)}: use 'mlp'")
        depth, height, width = shape
        super().__init__(
            nn.Linear(latents, 2 * channels * (height // 4) * (width // 4)),
            nn.SiLU(),
            nn.Unflatten(1, (2 * channels, height // 4, width // 4)),
            nn.ConvTranspose2d(2 * channels, channels, 4, stride=2, padding=1),
            nn.SiLU(),
            nn.ConvTranspose2d(channels, depth, 4, stride=2, padding=1),
        )


class LinearDecoders(nn.ModuleList):
    """A linear decoder for each output of a likelihood."""

    def forward(self, latents: Tensor) -> tuple[Tensor, ...]:
        return tuple(decoder(latents) for decoder in self)


class SplitDecoder(nn.Module):
    """One network, whose last layer is split into the outputs of a likelihood.

    Args:
        network: module that maps latents to `(size, entries, …)`.
        entries: number of entries of the last layer (channels of a convolutional network) for each output.
        shapes: event shapes of the outputs.
    """

    def __init__(self, network: nn.Module, entries: Sequence[int], shapes: Sequence[tuple[int, ...]]) -> None:
        super().__init__()
        self.network, self.entries, self.shapes = network, tuple(entries), tuple(shapes)

    def forward(self, latents: Tensor) -> Tensor | tuple[Tensor, ...]:
        parts = self.network(latents).split(self.entries, dim=1)
        found = tuple(part.reshape(-1, *shape) for part, shape in zip(parts, self.shapes, strict=True))
        return found[0] if len(found) == 1 else found


DECODERS: dict[str, type[nn.Module]] = {"linear": LinearDecoder, "mlp": MLPDecoder, "conv": ConvDecoder}


def make_decoder(
    decoder: str | nn.Module,
    latents: int,
    outputs: Mapping[str, tuple[int, ...]],
    column_norm: float | None = None,
) -> nn.Module:
    """Build a decoder from its name; a module is returned unchanged.

    Args:
        decoder: a name of `DECODERS`, or a module.
        latents: number of latents.
        outputs: names and event shapes of the outputs that the likelihood needs.
        column_norm: norm of the columns of the linear decoder's first output; "mlp" and "conv" ignore it.

    Raises:
        ProgramError: for an unknown name, or an output that the decoder cannot return.
    """
    if isinstance(decoder, nn.Module):
        return decoder
    if decoder not in DECODERS:
        raise ProgramError(f"unknown decoder {decoder!r}; known: {sorted(DECODERS)}, or a module of your own")
    shapes = [tuple(shape) for shape in outputs.values()]
    if decoder == "linear":
        first, *others = shapes
        parts = [LinearDecoder(latents, first, column_norm), *(LinearDecoder(latents, shape) for shape in others)]
        return parts[0] if len(parts) == 1 else LinearDecoders(parts)
    if len(shapes) == 1 and (decoder != "conv" or len(shapes[0]) <= 3):
        return DECODERS[decoder](latents, shapes[0])
    if decoder != "conv":
        entries = [prod(shape) for shape in shapes]
        return SplitDecoder(DECODERS[decoder](latents, (sum(entries),)), entries, shapes)
    sides = {shape[-2:] for shape in shapes}
    if len(sides) > 1 or any(len(shape) < 3 for shape in shapes):
        raise ProgramError(f"a convolutional decoder cannot return {dict(outputs)}: use 'mlp'")
    channels = [prod(shape[:-2]) for shape in shapes]
    return SplitDecoder(ConvDecoder(latents, (sum(channels), *sides.pop())), channels, shapes)

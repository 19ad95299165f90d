"""Decoders: modules that map latents `(size, latents)` to the input of a likelihood.

That is a tensor `(size, *shape)` for a likelihood with one output, and a tuple of tensors for one with several.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from math import prod
from typing import Any

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
        depth, height, width = _image(shape)
        super().__init__(
            nn.Linear(latents, 2 * channels * (height // 4) * (width // 4)),
            nn.SiLU(),
            nn.Unflatten(1, (2 * channels, height // 4, width // 4)),
            nn.ConvTranspose2d(2 * channels, channels, 4, stride=2, padding=1),
            nn.SiLU(),
            nn.ConvTranspose2d(channels, depth, 4, stride=2, padding=1),
        )


class SigmaVAEDecoder(nn.Sequential):
    """The decoder of the small network of the σ-VAE (Rybkin, Daniilidis & Levine 2021, arXiv 2006.13202, appendix B).

    A linear layer and three transposed convolutions with ReLU between the convolutions, for images whose sides are
    multiples of 4. The published network ends in a sigmoid, which `make_decoder` applies to locations alone.

    Args:
        latents: number of latents.
        shape: event shape of the output.
        width: maps of the last hidden layer, of which the one before has two and the first four times as many; 32 in
            the paper.
    """

    def __init__(self, latents: int, shape: tuple[int, ...], width: int = 32) -> None:
        depth, rows, columns = _image(shape)
        super().__init__(
            nn.Linear(latents, 4 * width * (rows // 4) * (columns // 4)),
            nn.Unflatten(1, (4 * width, rows // 4, columns // 4)),
            nn.ConvTranspose2d(4 * width, 2 * width, 6, stride=2, padding=2),
            nn.ReLU(),
            nn.ConvTranspose2d(2 * width, width, 6, stride=2, padding=2),
            nn.ReLU(),
            nn.ConvTranspose2d(width, depth, 5, stride=1, padding=2),
        )


class EAVAEDecoder(nn.Sequential):
    """The decoder of the EA-VAE for MNIST (Catoni et al. 2024, arXiv 2404.15390, from its code).

    A linear layer and three transposed convolutions of stride 2 with ReLU between them, for images whose sides are
    multiples of 8.

    Args:
        latents: number of latents.
        shape: event shape of the output.
        width: maps of the last hidden layer, of which the one before has two and the first four times as many; 64 in
            the paper.
    """

    def __init__(self, latents: int, shape: tuple[int, ...], width: int = 64) -> None:
        depth, rows, columns = _image(shape, 8)
        super().__init__(
            nn.Linear(latents, 4 * width * (rows // 8) * (columns // 8)),
            nn.Unflatten(1, (4 * width, rows // 8, columns // 8)),
            nn.ConvTranspose2d(4 * width, 2 * width, 4, stride=2, padding=1),
            nn.ReLU(),
            nn.ConvTranspose2d(2 * width, width, 4, stride=2, padding=1),
            nn.ReLU(),
            nn.ConvTranspose2d(width, depth, 4, stride=2, padding=1),
        )


def _image(shape: tuple[int, ...], factor: int = 4) -> tuple[int, int, int]:
    """Channels, height and width of images that a convolutional decoder can return, with sides that a factor divides.

    Raises:
        ProgramError: for any other shape.
    """
    if len(shape) != 3 or shape[1] % factor or shape[2] % factor:
        raise ProgramError(
            f"a convolutional decoder needs shape (channels, {factor}h, {factor}w), not {tuple(shape)}: use 'mlp'"
        )
    channels, height, width = shape
    return channels, height, width


class LinearDecoders(nn.ModuleList):
    """A linear decoder for each output of a likelihood."""

    def forward(self, latents: Tensor) -> tuple[Tensor, ...]:
        return tuple(decoder(latents) for decoder in self)


class SplitDecoder(nn.Module):
    """One network, whose last layer is split into the outputs of a likelihood.

    An output that has one entry for all positions of an image is the mean over positions of a convolutional network.

    Args:
        network: module that maps latents to `(size, entries, …)`.
        entries: number of entries of the last layer (channels of a convolutional network) for each output.
        shapes: event shapes of the outputs.
        between: for each output, whether it passes through a sigmoid, to lie between 0 and 1; None for no output.
    """

    def __init__(
        self,
        network: nn.Module,
        entries: Sequence[int],
        shapes: Sequence[tuple[int, ...]],
        between: Sequence[bool] | None = None,
    ) -> None:
        super().__init__()
        self.network, self.entries, self.shapes = network, tuple(entries), tuple(shapes)
        self.between = tuple(between or [False] * len(self.shapes))

    def forward(self, latents: Tensor) -> Tensor | tuple[Tensor, ...]:
        whole = self.network(latents).split(self.entries, dim=1)
        parts = [_over_positions(part, shape) for part, shape in zip(whole, self.shapes, strict=True)]
        found = tuple(
            (part.sigmoid() if between else part).reshape(-1, *shape)
            for part, shape, between in zip(parts, self.shapes, self.between, strict=True)
        )
        return found[0] if len(found) == 1 else found


def _over_positions(part: Tensor, shape: tuple[int, ...]) -> Tensor:
    return part.mean((2, 3)) if part.dim() == 4 and shape[-2:] == (1, 1) else part


DECODERS: dict[str, Callable[..., nn.Module]] = {
    "linear": LinearDecoder,
    "mlp": MLPDecoder,
    "conv": ConvDecoder,
    "sigma-vae": SigmaVAEDecoder,
    "ea-vae-conv": EAVAEDecoder,
}
CONVOLUTIONAL = ("conv", "sigma-vae", "ea-vae-conv")


def make_decoder(
    decoder: str | Mapping[str, Any] | nn.Module,
    latents: int,
    outputs: Mapping[str, tuple[int, ...]],
    column_norm: float | None = None,
) -> nn.Module:
    """Build a decoder from its name or from `{"name": …, **arguments}`; a module is returned unchanged.

    Args:
        decoder: a name of `DECODERS`: "linear" (`bias`, `column_norm`), "mlp" (`hidden`), "conv" (`channels`),
            "sigma-vae" (`width`; outputs called `location` lie between 0 and 1), "ea-vae-conv" (`width`), with
            arguments of its class; or a module.
        latents: number of latents.
        outputs: names and event shapes of the outputs that the likelihood needs.
        column_norm: norm of the columns of the linear decoder's first output; the other decoders ignore it.

    Raises:
        ProgramError: for an unknown name or argument, or an output that the decoder cannot return.
    """
    if isinstance(decoder, nn.Module):
        return decoder
    name, arguments = _name_and_arguments(decoder)
    shapes = [tuple(shape) for shape in outputs.values()]
    if name == "linear":
        first, *others = shapes
        parts = [
            LinearDecoder(latents, first, **{"column_norm": column_norm, **arguments}),
            *(LinearDecoder(latents, shape, **arguments) for shape in others),
        ]
        return parts[0] if len(parts) == 1 else LinearDecoders(parts)
    if len(shapes) == 1 and (name == "mlp" or (name == "conv" and len(shapes[0]) <= 3)):
        return DECODERS[name](latents, shapes[0], **arguments)
    if name not in CONVOLUTIONAL:
        entries = [prod(shape) for shape in shapes]
        return SplitDecoder(DECODERS[name](latents, (sum(entries),), **arguments), entries, shapes)
    sides = {shape[-2:] for shape in shapes} - {(1, 1)}
    if len(sides) != 1 or any(len(shape) < 3 for shape in shapes):
        raise ProgramError(f"a convolutional decoder cannot return {dict(outputs)}: use 'mlp'")
    channels = [prod(shape[:-2]) for shape in shapes]
    network = DECODERS[name](latents, (sum(channels), *sides.pop()), **arguments)
    between = [name == "sigma-vae" and output == "location" for output in outputs]
    return SplitDecoder(network, channels, shapes, between)


def _name_and_arguments(decoder: str | Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    """The name of a decoder, and arguments that its class takes."""
    arguments = {"name": decoder} if isinstance(decoder, str) else dict(decoder)
    if "name" not in arguments:
        raise ProgramError(f"decoder={arguments!r} lacks the name: give {{'name': …, **arguments}}")
    name = arguments.pop("name")
    if not isinstance(name, str) or name not in DECODERS:
        raise ProgramError(f"unknown decoder {name!r}; known: {sorted(DECODERS)}, or a module of your own")
    known = {key: p.default for key, p in inspect.signature(DECODERS[name]).parameters.items()}
    wanted = ", ".join(key for key in known if key not in ("latents", "shape"))
    for key, value in arguments.items():
        if key not in wanted.split(", "):
            raise ProgramError(
                f"decoder {name!r} has no argument {key!r}; its arguments are: {wanted}. Give them beside the name, as "
                f'in decoder={{"name": "{name}", "{wanted.split(", ")[0]}": VALUE}}'
            )
        if type(known[key]) is int and not (type(value) is int and value > 0):
            raise ProgramError(f"decoder {name!r}: {key}={value!r} is given, wanted a whole number above 0")
    return name, arguments

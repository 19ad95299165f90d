"""Decoders: latents `(size, latents)` → output `(size, *shape)`."""

from __future__ import annotations

from math import prod

import torch
from torch import Tensor, nn

from calibrant.errors import ProgramError


class LinearDecoder(nn.Module):
    """`W z + b`.

    Args:
        latents: number of latents.
        shape: event shape of the output.
        column_norm: the fixed norm of every column of W; None leaves it free.
        bias: whether there is a b.
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
    """Two hidden layers with SiLU."""

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


DECODERS: dict[str, type[nn.Module]] = {"linear": LinearDecoder, "mlp": MLPDecoder, "conv": ConvDecoder}


def make_decoder(
    decoder: str | nn.Module, latents: int, shape: tuple[int, ...], column_norm: float | None = None
) -> nn.Module:
    """A decoder from its name, or as it is; `column_norm` is for the linear one alone.

    Raises:
        ProgramError: for an unknown name, or a shape that the decoder can't make.
    """
    if isinstance(decoder, nn.Module):
        return decoder
    if decoder not in DECODERS:
        raise ProgramError(f"unknown decoder {decoder!r}; known: {sorted(DECODERS)}, or a module of your own")
    if decoder == "linear":
        return LinearDecoder(latents, tuple(shape), column_norm)
    return DECODERS[decoder](latents, tuple(shape))

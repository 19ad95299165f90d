"""Encoders of classes, of inputs with masked entries, and of several inputs together."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import prod
from typing import Any

import torch
from torch import Tensor, nn

from calibrant.guides.encoders.layers import Shapes


class ClassEncoder(nn.Module):
    """An encoder of integer classes 0 … count − 1, each of which has learned features.

    Args:
        shapes: shape of one input of classes.
        count: number of classes.
        width: number of features per entry.
    """

    def __init__(self, shapes: Shapes, count: int, width: int = 16) -> None:
        super().__init__()
        ((self.name, shape),) = shapes.items()
        self.table = nn.Embedding(count, width)
        self.features = width * prod(shape)

    def forward(self, inputs: Mapping[str, Tensor]) -> Tensor:
        return self.table(inputs[self.name].long()).flatten(1)


class Filled(nn.Module):
    """An encoder of one input in which masked entries are replaced by their means over the data."""

    mean: Tensor

    def __init__(self, encoder: nn.Module, name: str, mask: str, shape: tuple[int, ...]) -> None:
        super().__init__()
        self.encoder, self.name, self.mask, self.features = encoder, name, mask, encoder.features
        self.register_buffer("mean", torch.zeros(shape))

    @torch.no_grad()
    def set_statistics(self, inputs: Mapping[str, Tensor]) -> None:
        """Store the mean of each entry over the data where it is not masked, and the statistics of the encoder."""
        values, seen = inputs[self.name].double(), self._seen(inputs)
        self.mean.copy_(torch.where(seen, values, 0.0).sum(0) / seen.expand_as(values).sum(0).clamp(min=1))
        set_statistics(self.encoder, self._filled(inputs))

    def forward(self, inputs: Mapping[str, Tensor]) -> Tensor:
        return self.encoder(self._filled(inputs))

    def _filled(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {self.name: torch.where(self._seen(inputs), inputs[self.name].to(self.mean.dtype), self.mean)}

    def _seen(self, inputs: Mapping[str, Tensor]) -> Tensor:
        mask = inputs[self.mask] != 0
        return mask.reshape(*mask.shape, *[1] * (inputs[self.name].dim() - mask.dim()))


class Parts(nn.ModuleList):
    """A list of encoders of different inputs."""

    def set_statistics(self, inputs: Mapping[str, Tensor]) -> None:
        """Store in each encoder the statistics of its own inputs."""
        for part in self:
            set_statistics(part, inputs)


def set_statistics(encoder: nn.Module | None, inputs: Mapping[str, Tensor]) -> None:
    """Store the statistics of its inputs in an encoder, if it takes any."""
    owner = encoder if isinstance(encoder, Filled | InRange) else getattr(encoder, "inputs", None)
    if owner is not None:
        owner.set_statistics(inputs)


class FusedEncoder(nn.Module):
    """An encoder of several inputs: the features of all single encoders, and two hidden layers that combine them."""

    def __init__(self, parts: Sequence[Any], hidden: int = 256) -> None:
        super().__init__()
        self.inputs, total = Parts(parts), sum(part.features for part in parts)
        self.network = nn.Sequential(nn.Linear(total, hidden), nn.SiLU(), nn.Linear(hidden, hidden), nn.SiLU())
        self.features = total + hidden

    def forward(self, inputs: Mapping[str, Tensor]) -> Tensor:
        joined = torch.cat([part(inputs) for part in self.inputs], -1)
        return torch.cat([joined, self.network(joined)], -1)


class InRange(nn.Module):
    """An encoder that sees an image of more or less contrast than nearly all of its training data at their contrast.

    Contrast is the root mean square deviation from the mean of the training data. A network's features of other
    contrasts would be an extrapolation.

    Args:
        encoder: the encoder, with an attribute `features`.
        name: name of the image in the inputs.
        shape: shape of the image.
    """

    centre: Tensor
    contrasts: Tensor

    def __init__(self, encoder: Any, name: str, shape: tuple[int, ...]) -> None:
        super().__init__()
        self.encoder, self.name, self.features = encoder, name, encoder.features
        self.register_buffer("centre", torch.zeros(shape))
        self.register_buffer("contrasts", torch.tensor([0.0, float("inf")]))

    @torch.no_grad()
    def set_statistics(self, inputs: Mapping[str, Tensor]) -> None:
        """Store the mean image and the range of contrasts, from the 1% to the 99% quantile."""
        set_statistics(self.encoder, inputs)
        x = inputs[self.name].double()
        self.centre.copy_(x.mean(0))
        quantiles = torch.tensor([0.01, 0.99], dtype=x.dtype, device=x.device)
        self.contrasts.copy_(_contrast(x - x.mean(0)).quantile(quantiles))

    def forward(self, inputs: Mapping[str, Tensor]) -> Tensor:
        rest = inputs[self.name] - self.centre
        contrast = _contrast(rest).clamp_min(torch.finfo(rest.dtype).tiny)
        factor = contrast.clamp(self.contrasts[0], self.contrasts[1]) / contrast
        return self.encoder({self.name: self.centre + factor.reshape(-1, *[1] * (rest.dim() - 1)) * rest})


def _contrast(rest: Tensor) -> Tensor:
    return rest.reshape(len(rest), -1).square().mean(1).sqrt()

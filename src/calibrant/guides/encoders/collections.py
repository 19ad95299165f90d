"""Encoders of sets and sequences."""

from __future__ import annotations

from collections.abc import Mapping
from math import prod

import torch
from torch import Tensor, nn
from torch.nn.functional import avg_pool1d, silu, softplus

from calibrant.errors import ProgramError
from calibrant.guides.encoders.layers import Shapes


class Elements(nn.Module):
    """The elements of a set or sequence, each entry standardised over all elements; masked entries are zero.

    Returns `(values, valid)`: values `(size, elements, width)`, which include the mask as further entries, and valid
    `(size, elements, 1)`, which is 1 where an element has any entry that is not masked.
    """

    loc: Tensor
    scale: Tensor

    def __init__(self, shapes: Shapes, mask: str | None) -> None:
        super().__init__()
        names = [name for name in shapes if name != mask]
        if len(names) != 1 or not shapes[names[0]]:
            raise ProgramError(
                f"an encoder of sets or sequences takes one input (elements, ...), and its mask, not {dict(shapes)}"
            )
        self.name, self.mask = names[0], mask
        self.elements, entries = shapes[self.name][0], prod(shapes[self.name][1:])
        self.width = entries + (prod(shapes[mask][1:]) if mask is not None else 0)
        self.register_buffer("loc", torch.zeros(entries))
        self.register_buffer("scale", torch.ones(entries))

    @torch.no_grad()
    def set_statistics(self, inputs: Mapping[str, Tensor]) -> None:
        """Compute and store mean and standard deviation of each entry over all elements that are not masked."""
        values, mask = self._read(inputs)
        values = values.double()
        seen = torch.ones_like(values, dtype=torch.bool) if mask is None else mask.expand_as(values)
        values, count = torch.where(seen, values, 0.0), seen.sum((0, 1)).clamp(min=1)
        loc = values.sum((0, 1)) / count
        scale = (torch.where(seen, values - loc, 0.0).pow(2).sum((0, 1)) / count).sqrt()
        self.loc.copy_(loc)
        self.scale.copy_(torch.where(scale > 1e-6 * loc.abs(), scale, 1.0))  # a constant entry is not rescaled

    def forward(self, inputs: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        values, mask = self._read(inputs)
        values = (values.to(self.loc.dtype) - self.loc) / self.scale
        if mask is None:
            return values, torch.ones_like(values[..., :1])
        values = torch.where(mask, values, 0.0)  # a product would not do: masked values may be infinite
        return torch.cat([values, mask.to(values.dtype)], -1), mask.any(-1, keepdim=True).to(values.dtype)

    def _read(self, inputs: Mapping[str, Tensor]) -> tuple[Tensor, Tensor | None]:
        values, mask = inputs[self.name], None if self.mask is None else inputs[self.mask]
        shape = (len(values), self.elements, -1)
        return values.reshape(shape), None if mask is None else mask.reshape(shape) != 0


class Pool(nn.Module):
    """The sum over elements, divided by their number plus a learned number for each channel.

    The mean of a conjugate posterior shrinks towards the prior in this way. For an empty set, the result is zero.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.raw = nn.Parameter(torch.full((channels,), 0.5413))  # softplus(0.5413) = 1

    def forward(self, elements: Tensor, valid: Tensor) -> Tensor:
        return (elements * valid).sum(1) / (valid.sum(1) + softplus(self.raw))


class SetEncoder(nn.Module):
    """An encoder of a set of elements: two layers of sums over elements, where the second layer sees the first sum.

    The order of the elements does not matter. "Deep sets": Zaheer et al. 2017, arXiv 1703.06114.

    Args:
        shapes: shapes of one input (elements, ...) and of its mask, if it has one.
        mask: name of the mask, whose shape is (elements,) or that of the input; entries where it is zero or False do
            not affect the features.
        hidden: half of the number of features.
    """

    def __init__(self, shapes: Shapes, mask: str | None = None, hidden: int = 256) -> None:
        super().__init__()
        self.inputs = Elements(shapes, mask)
        width = self.inputs.width
        self.first = nn.Sequential(nn.Linear(width, hidden), nn.SiLU(), nn.Linear(hidden, hidden))
        self.second = nn.Sequential(nn.Linear(2 * hidden, hidden), nn.SiLU(), nn.Linear(hidden, hidden))
        self.linear = nn.Linear(width, hidden)
        self.pools = nn.ModuleList(Pool(hidden) for _ in range(3))
        self.count = nn.Linear(2, hidden)
        self.network = nn.Sequential(nn.Linear(3 * hidden, hidden), nn.SiLU())
        self.features = 2 * hidden

    def forward(self, inputs: Mapping[str, Tensor]) -> Tensor:
        values, valid = self.inputs(inputs)
        elements = self.first(values)
        context = self.pools[0](elements, valid)
        together = torch.cat([elements, context[:, None].expand_as(elements)], -1)
        pooled = self.pools[1](elements + self.second(together), valid)
        number = valid.sum(1)  # given its own features, since the width of a posterior depends on it
        count = self.count(torch.cat([number.log1p(), 1 / (1 + number)], -1))
        seen = self.network(torch.cat([context, pooled, count], -1))
        return torch.cat([seen, self.pools[2](self.linear(values), valid) + count], -1)


class SequenceEncoder(nn.Module):
    """An encoder of a sequence: dilated convolutions that reach over the whole sequence, and a linear path.

    Args:
        shapes: shapes of one input (times, ...) and of its mask, if it has one.
        mask: name of the mask, whose shape is (times,) or that of the input; entries where it is zero or False do not
            affect the features.
        channels: number of channels of the convolutions.
        hidden: half of the number of features.
    """

    def __init__(self, shapes: Shapes, mask: str | None = None, channels: int = 64, hidden: int = 256) -> None:
        super().__init__()
        self.inputs = Elements(shapes, mask)
        times, width = self.inputs.elements, self.inputs.width
        self.embed = nn.Linear(width, channels)
        self.position = nn.Parameter(torch.randn(times, channels) / 2)
        dilations = [2**level for level in range(max(1, (times - 1).bit_length()))]
        self.layers = nn.ModuleList(nn.Conv1d(channels, channels, 3, padding=d, dilation=d) for d in dilations)
        self.step, self.part = -(-times // 256), -(-times // 8)  # times per mean, for linear path and network
        self.network = nn.Sequential(nn.Linear(channels * -(-times // self.part), hidden), nn.SiLU())
        self.linear = nn.Linear(width * -(-times // self.step), hidden)
        self.features = 2 * hidden

    def forward(self, inputs: Mapping[str, Tensor]) -> Tensor:
        values, _ = self.inputs(inputs)
        maps = (self.embed(values) + self.position).transpose(1, 2)
        for layer in self.layers:
            maps = maps + layer(silu(maps))
        seen = self.network(_means(silu(maps), self.part))
        return torch.cat([seen, self.linear(_means(values.transpose(1, 2), self.step))], -1)


def _means(maps: Tensor, length: int) -> Tensor:
    """Means over stretches of the given length in the last dimension, `(size, entries)`."""
    return avg_pool1d(maps, length, ceil_mode=True).flatten(1)

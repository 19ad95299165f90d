"""Encoders: observations and covariates of a datum → features `(size, features)`."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from math import prod
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import avg_pool1d, avg_pool2d, silu, softplus

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
    """Linear features of the vector, unless it is left out, and of its direction, `features` in all.

    The exact posterior mean of a linear decoder is linear in the image; under a scale, it is that times a function of
    the contrast. The scale itself is not: its logarithm follows that of the contrast.
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
    """Two hidden layers with SiLU on direction and energies, beside linear paths: half of the features each.

    Args:
        shapes: the inputs, joined to one vector.
        hidden: half of the number of features.
        vector: whether features linear in the input itself are among them, or in its direction and log contrast alone.
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


class Residual(nn.Module):
    """Two normalised convolutions beside the identity; nearly the identity at first.

    Groups of 8 channels are normalised datum by datum. What this takes from an image, its contrast, goes another way.
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


class ConvEncoder(nn.Module):
    """Residual convolutions on one image's direction, beside the energies and linear paths of `MLPEncoder`.

    A first layer of stride 1, 2 or 4, then residual blocks at half the resolution each, down to a map of 4×4 or less
    that is flattened. Energies and linear paths see the image itself, or its means over blocks of pixels where it has
    more than 4,096 entries.

    Args:
        shapes: one image, (channels, height, width), of any size.
        channels: maps of the first layer, a multiple of 8; doubled at each halving, up to 128.
        hidden: half of the number of features.
        vector: as in `MLPEncoder`.
    """

    def __init__(self, shapes: Shapes, channels: int = 32, hidden: int = 256, vector: bool = True) -> None:
        super().__init__()
        if len(shapes) != 1 or any(len(shape) != 3 for shape in shapes.values()):
            raise ProgramError(f"a convolutional encoder takes one image (channels, height, width), not {dict(shapes)}")
        if channels < 8 or channels % 8:
            raise ProgramError(f"channels={channels} of a convolutional encoder: a multiple of 8")
        (self.shape,) = shapes.values()
        self.inputs, self.block = Standardize(shapes), _block(self.shape)
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
        """Means over blocks, `(size, entries)`."""
        sides = [min(self.block, side) for side in self.shape[1:]]
        return avg_pool2d(image.reshape(-1, *self.shape), sides, ceil_mode=True).flatten(1)


def _block(shape: tuple[int, ...], most: int = 4096) -> int:
    """The side of the blocks that leave an image `most` entries."""
    block = 1
    while block < max(shape[1:]) and shape[0] * prod(-(-side // block) for side in shape[1:]) > most:
        block *= 2
    return block


def _convolutions(shape: tuple[int, ...], channels: int) -> tuple[nn.Sequential, int]:
    """The layers, and the number of their outputs."""
    stride = next((s for s in (1, 2) if max(shape[1:]) <= 16 * s), 4)
    sides = [-(-side // stride) for side in shape[1:]]
    first = nn.Conv2d(shape[0], channels, 2 * stride + 1, stride, padding=stride)
    layers: list[nn.Module] = [first, Residual(channels)]
    while max(sides) > 4:
        wider = max(channels, min(2 * channels, 128))
        layers += [nn.Conv2d(channels, wider, 3, 2, padding=1), Residual(wider)]
        channels, sides = wider, [-(-side // 2) for side in sides]
    return nn.Sequential(*layers, nn.SiLU(), nn.Flatten()), channels * prod(sides)


class Elements(nn.Module):
    """The elements of a set or sequence, each entry standardised over all of them; masked ones are zero.

    Returns `(values, valid)`: `(size, elements, width)`, with the mask as further entries, and `(size, elements, 1)`,
    1 where an element has any entry that is not masked.
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
        """Take the mean and standard deviation of each entry over all elements that are not masked."""
        values, mask = self._read(inputs)
        values = values.double()
        seen = torch.ones_like(values, dtype=torch.bool) if mask is None else mask.expand_as(values)
        values, count = torch.where(seen, values, 0.0), seen.sum((0, 1)).clamp(min=1)
        loc = values.sum((0, 1)) / count
        scale = (torch.where(seen, values - loc, 0.0).pow(2).sum((0, 1)) / count).sqrt()
        self.loc.copy_(loc)
        self.scale.copy_(torch.where(scale > 1e-6 * loc.abs(), scale, 1.0))  # a constant entry keeps its unit

    def forward(self, inputs: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        values, mask = self._read(inputs)
        values = (values.to(self.loc.dtype) - self.loc) / self.scale
        if mask is None:
            return values, torch.ones_like(values[..., :1])
        values = torch.where(mask, values, 0.0)  # not a product: what is masked may be infinite
        return torch.cat([values, mask.to(values.dtype)], -1), mask.any(-1, keepdim=True).to(values.dtype)

    def _read(self, inputs: Mapping[str, Tensor]) -> tuple[Tensor, Tensor | None]:
        values, mask = inputs[self.name], None if self.mask is None else inputs[self.mask]
        shape = (len(values), self.elements, -1)
        return values.reshape(shape), None if mask is None else mask.reshape(shape) != 0


class Pool(nn.Module):
    """Sum over elements, divided by their number plus a learned number for each channel.

    That is how a conjugate posterior's mean shrinks towards the prior; nothing is divided by zero for an empty set.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.raw = nn.Parameter(torch.full((channels,), 0.5413))  # softplus(0.5413) = 1

    def forward(self, elements: Tensor, valid: Tensor) -> Tensor:
        return (elements * valid).sum(1) / (valid.sum(1) + softplus(self.raw))


class SetEncoder(nn.Module):
    """A set of elements in any order: two layers of sums over elements, the second in the context of the first.

    "Deep sets": Zaheer et al. 2017, arXiv 1703.06114.

    Args:
        shapes: one input (elements, ...) and, where it has one, its mask.
        mask: name of the mask, of shape (elements,) or that of the input; zero or False hides an entry altogether.
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
        number = valid.sum(1)  # in many channels: a posterior's width follows it
        count = self.count(torch.cat([number.log1p(), 1 / (1 + number)], -1))
        seen = self.network(torch.cat([context, pooled, count], -1))
        return torch.cat([seen, self.pools[2](self.linear(values), valid) + count], -1)


class SequenceEncoder(nn.Module):
    """A sequence: dilated convolutions that see all of it, beside a linear path.

    Args:
        shapes: one input (times, ...) and, where it has one, its mask.
        mask: name of the mask, of shape (times,) or that of the input; zero or False hides an entry altogether.
        channels: of the convolutions.
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
        self.step, self.part = -(-times // 256), -(-times // 8)  # of the means that linear path and network see
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
    """Means over stretches of the last dimension, `(size, entries)`."""
    return avg_pool1d(maps, length, ceil_mode=True).flatten(1)


class ClassEncoder(nn.Module):
    """Integer classes 0 … count − 1, each with learned features.

    Args:
        shapes: one input of classes.
        count: number of classes.
        width: features of one entry.
    """

    def __init__(self, shapes: Shapes, count: int, width: int = 16) -> None:
        super().__init__()
        ((self.name, shape),) = shapes.items()
        self.table = nn.Embedding(count, width)
        self.features = width * prod(shape)

    def forward(self, inputs: Mapping[str, Tensor]) -> Tensor:
        return self.table(inputs[self.name].long()).flatten(1)


class Filled(nn.Module):
    """An encoder of one input that sees an entry's mean where the mask hides it."""

    mean: Tensor

    def __init__(self, encoder: nn.Module, name: str, mask: str, shape: tuple[int, ...]) -> None:
        super().__init__()
        self.encoder, self.name, self.mask, self.features = encoder, name, mask, encoder.features
        self.register_buffer("mean", torch.zeros(shape))

    @torch.no_grad()
    def set_statistics(self, inputs: Mapping[str, Tensor]) -> None:
        """Take each entry's mean where it is not masked, then the encoder's own statistics."""
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
    """Encoders of different inputs."""

    def set_statistics(self, inputs: Mapping[str, Tensor]) -> None:
        """Each takes the statistics of its own inputs."""
        for part in self:
            set_statistics(part, inputs)


def set_statistics(encoder: nn.Module | None, inputs: Mapping[str, Tensor]) -> None:
    """Give an encoder the statistics of its inputs, where it takes any."""
    owner = encoder if isinstance(encoder, Filled) else getattr(encoder, "inputs", None)
    if owner is not None:
        owner.set_statistics(inputs)


class FusedEncoder(nn.Module):
    """Several inputs: the features of each one's encoder, and two hidden layers that see them all."""

    def __init__(self, parts: Sequence[Any], hidden: int = 256) -> None:
        super().__init__()
        self.inputs, total = Parts(parts), sum(part.features for part in parts)
        self.network = nn.Sequential(nn.Linear(total, hidden), nn.SiLU(), nn.Linear(hidden, hidden), nn.SiLU())
        self.features = total + hidden

    def forward(self, inputs: Mapping[str, Tensor]) -> Tensor:
        joined = torch.cat([part(inputs) for part in self.inputs], -1)
        return torch.cat([joined, self.network(joined)], -1)


# -- from a specification ----------------------------------------------------------------------------------------------

KINDS: dict[str, Callable[..., nn.Module]] = {
    "mlp": MLPEncoder,
    "conv": ConvEncoder,
    "set": SetEncoder,
    "sequence": SequenceEncoder,
    "classes": ClassEncoder,
}
_SETS = ("set", "sequence")


def default_encoder(shapes: Shapes) -> str | dict[str, Any]:
    """What the inputs' shapes ask for: a specification that `make_encoder` takes.

    Convolutions for an image of more than 1,024 entries; a sequence for an input (times, entries) with a mask; else an
    MLP. A mask is an input called "mask" or "NAME_mask", of the shape of the one that it masks or of its elements.
    """
    kinds = _by_input({}, shapes)
    return kinds[next(iter(shapes))]["kind"] if len(shapes) == 1 else kinds


def make_encoder(spec: str | Mapping[str, Any], shapes: Shapes) -> nn.Module:
    """An encoder, `dict of inputs → (size, features)`, from its specification (JSON values) and without data.

    Args:
        spec: "mlp" for all inputs joined to one vector; "conv", "set" or "sequence" for the inputs of so many
            dimensions (three, two, two), the others as in `default_encoder`; or input → kind, which is one of these
            names, "classes", or `{"kind": name, **options}` with options of its class (`hidden`, `count`, …) and
            `mask`, the input that masks this one. What is masked never reaches the features.
        shapes: input → event shape, of observations and covariates.

    Raises:
        ProgramError: for an unknown kind, input or option, and for a shape that a kind does not take.
    """
    if spec == "mlp":
        return MLPEncoder(shapes)
    kinds = _by_input(_by_dimensions(spec, shapes) if isinstance(spec, str) else spec, shapes)
    parts = [_make_part(name, kind, shapes, alone=len(kinds) == 1) for name, kind in kinds.items()]
    return parts[0] if len(parts) == 1 else FusedEncoder(parts)


def encoder_of_a_scale(spec: str | Mapping[str, Any], name: str, shape: tuple[int, ...]) -> dict[str, Any]:
    """The same encoder of one input, for the scale that multiplies it: no feature is linear in the input itself.

    The data of a Gaussian scale mixture have contrasts fifty times the usual one. There a log scale that is linear in
    the image is anything, and the images that it spoils are those whose scale is best known.
    """
    kinds = _by_input(spec if isinstance(spec, Mapping) else {name: spec}, {name: shape})
    options = {"mlp": {"vector": False}, "conv": {"vector": False}}
    return {name: {**options.get(kind["kind"], {}), **kind} for name, kind in kinds.items()}


ENCODERS: dict[str, Callable[[Shapes], nn.Module]] = {
    name: partial(make_encoder, name) for name in ("mlp", "conv", *_SETS)
}


def _by_dimensions(kind: str, shapes: Shapes) -> dict[str, str]:
    _known(kind)
    wanted = 3 if kind == "conv" else 2
    masks = {_mask_of(name, shapes) for name in shapes}
    found = {name: kind for name, shape in shapes.items() if len(shape) == wanted and name not in masks}
    if not found or kind == "classes":
        raise ProgramError(
            f"encoder={kind!r} finds no input of its own among {dict(shapes)}: name the kind of each, "
            'encoder={"NAME": "KIND"}, or use encoder="mlp"'
        )
    return found


def _by_input(spec: Mapping[str, Any], shapes: Shapes) -> dict[str, dict[str, Any]]:
    """Input → kind with options, for every input that is not the mask of a set or sequence alone."""
    if unknown := set(spec) - set(shapes):
        raise ProgramError(f"encoder= names {sorted(unknown)}, which are no inputs; those are {sorted(shapes)}")
    kinds = {name: _kind(name, spec.get(name), shapes) for name in shapes}
    masks = {kind.get("mask") for kind in kinds.values() if kind["kind"] in _SETS}
    return {name: kind for name, kind in kinds.items() if name in spec or name not in masks}


def _kind(name: str, asked: Any, shapes: Shapes) -> dict[str, Any]:
    """The kind of one input, with its mask where there is one."""
    shape, mask = shapes[name], _mask_of(name, shapes)
    if asked is None:
        asked = "sequence" if mask and len(shape) == 2 else "conv" if len(shape) == 3 and prod(shape) > 1024 else "mlp"
    kind = {"kind": asked} if not isinstance(asked, Mapping) else dict(asked)
    if _known(kind.get("kind")) != "classes" and mask:
        kind = {"mask": mask, **kind}
    if (mask := kind.get("mask")) is None:
        return {key: value for key, value in kind.items() if key != "mask"}
    if mask not in shapes or shapes[mask] not in (shape, shape[:1]):
        found = f"has shape {shapes[mask]}" if mask in shapes else "is no input"
        raise ProgramError(f"the mask {mask!r} of {name!r} {found}, wanted one of shape {shape} or {shape[:1]}")
    return kind


def _known(kind: Any) -> str:
    if not isinstance(kind, str) or kind not in KINDS:
        raise ProgramError(f"unknown encoder {kind!r}; known: {sorted(KINDS)}, or a module of your own for all inputs")
    return kind


def _make_part(name: str, kind: Mapping[str, Any], shapes: Shapes, alone: bool) -> nn.Module:
    """The encoder of one input; half as wide as usual beside others."""
    options, mask = {key: value for key, value in kind.items() if key not in ("kind", "mask")}, kind.get("mask")
    if not alone and kind["kind"] != "classes":
        options = {"hidden": 128, **options}
    own = {name: shapes[name]}
    try:
        if kind["kind"] in _SETS:
            return KINDS[kind["kind"]](own if mask is None else {**own, mask: shapes[mask]}, mask=mask, **options)
        part = KINDS[kind["kind"]](own, **options)
    except TypeError as error:
        raise ProgramError(f"encoder={{{name!r}: {dict(kind)}}}: {error}") from error
    return part if mask is None else Filled(part, name, mask, shapes[name])


def _mask_of(name: str, shapes: Shapes) -> str | None:
    """The input that is called this one's mask and has its shape, or that of its elements."""
    shape = shapes[name]
    allowed = [shape, shape[:1]] if len(shape) == 2 else [shape]
    if not shape or name.endswith("mask"):
        return None
    return next((mask for mask in (f"{name}_mask", "mask") if mask in shapes and shapes[mask] in allowed), None)

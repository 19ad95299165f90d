"""The part of a network that all methods share: inputs, standardised features, embedding."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from calibrant.errors import ProgramError
from calibrant.representations.kinds import is_whole
from calibrant.representations.learners.labelled import Labelled

TRUNKS = ("none", "linear", "mlp")


@dataclass(frozen=True)
class Inputs:
    """What the network of a method is built for.

    Attributes:
        shape: event shape of the inputs.
        classes: number of classes.
        trunk: "none", "linear" or "mlp".
        latents: dimension of the embedding that is learned.
        width: width of the hidden layer of "mlp".
        backbone: module from inputs to features `(n, features)`; None where the inputs are features.
    """

    shape: tuple[int, ...]
    classes: int
    trunk: str
    latents: int
    width: int
    backbone: nn.Module | None = None

    def __post_init__(self) -> None:
        if self.trunk not in TRUNKS:
            raise ProgramError(f"trunk={self.trunk!r}: give one of {', '.join(map(repr, TRUNKS))}")
        check_backbone(self.backbone)
        if not all(is_whole(number) for number in (self.latents, self.width)) or self.latents < 2 or self.width < 1:
            raise ProgramError(
                f"latents={self.latents!r}, width={self.width!r}: give whole numbers, 2 latents or more, and a width "
                "above 0"
            )

    @property
    def tunes(self) -> bool:
        """Whether there is a backbone with weights that are trained."""
        return self.backbone is not None and any(weight.requires_grad for weight in self.backbone.parameters())


def check_backbone(backbone: object) -> None:
    """Refuse a backbone that is no module.

    Raises:
        ProgramError: naming `backbone(NAME)`.
    """
    if backbone is not None and not isinstance(backbone, nn.Module):
        shown = repr(backbone) if isinstance(backbone, str) else getattr(backbone, "__name__", type(backbone).__name__)
        name = shown if isinstance(backbone, str) else "NAME"
        raise ProgramError(
            f"backbone={shown} is no module: give cal.representations.backbone({name}), or a module of yours"
        )


class Trunk(nn.Module):
    """Maps inputs `(n, *shape)` to features `(n, features)`: backbone, standardisation, learned layers.

    A backbone whose weights are all frozen is no submodule: it is not saved, runs without gradient and in eval mode. Of
    any other one, the trunk has a copy.

    Args:
        inputs: what the network is built for.
        embeds: whether the last layer maps to `inputs.latents` dimensions; not for programs, which have a map of
            their own.

    Attributes:
        features: number of features that are returned.
    """

    loc: Tensor
    scale: Tensor

    def __init__(self, inputs: Inputs, embeds: bool = True) -> None:
        super().__init__()
        self.tuned = copy.deepcopy(inputs.backbone) if inputs.tunes else None
        self._frozen: list[Any] = [] if inputs.tunes or inputs.backbone is None else [inputs.backbone.eval()]
        with torch.no_grad():
            entries = self._given(torch.zeros(2, *inputs.shape)).shape[1]
        self.register_buffer("loc", torch.zeros(entries))
        self.register_buffer("scale", torch.ones(entries))
        self.network, self.features = _layers(inputs, entries, embeds)

    def _given(self, x: Tensor) -> Tensor:
        """The features that the learned layers start from, `(n, entries)`."""
        if self.tuned is not None:
            return self.tuned(x).flatten(1)
        if self._frozen:
            with torch.no_grad():
                return self._frozen[0](x.float()).flatten(1).to(x.dtype)
        return x.flatten(1)

    @torch.no_grad()
    def standardise(self, data: Labelled) -> None:
        """Store mean and standard deviation of every feature over the data; constant features are left as they are."""
        self.eval()
        total = torch.zeros_like(self.loc, dtype=torch.float64)
        squares, shift = torch.zeros_like(total), None
        for block in data.blocks():
            rows = self._given(data.batch(block)["x"]).double()
            shift = rows.mean(0) if shift is None else shift  # so that squares of large means do not cancel
            total, squares = total + (rows - shift).sum(0), squares + (rows - shift).pow(2).sum(0)
        assert shift is not None
        mean = total / len(data)
        sd = (squares / len(data) - mean.pow(2)).clamp(min=0).sqrt()
        self.loc.copy_(mean + shift)
        self.scale.copy_(torch.where(sd > 1e-6 * sd.max(), sd, torch.ones_like(sd)))

    def given(self, x: Tensor) -> Tensor:
        """The features of the backbone, or of the inputs themselves, as they are: `(n, entries)`."""
        return self._given(x)

    def forward(self, x: Tensor) -> Tensor:
        return self.network((self._given(x) - self.loc) / self.scale)


def _layers(inputs: Inputs, entries: int, embeds: bool) -> tuple[nn.Module, int]:
    """The learned layers, and the number of their outputs."""
    layers: list[nn.Module] = []
    features = entries
    if inputs.trunk == "mlp":
        layers, features = [nn.Linear(entries, inputs.width), nn.LeakyReLU()], inputs.width
    if inputs.trunk != "none" and embeds:
        layers, features = [*layers, nn.Linear(features, inputs.latents)], inputs.latents
    return nn.Sequential(*layers), features

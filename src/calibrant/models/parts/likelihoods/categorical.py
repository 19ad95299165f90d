"""A probability for each of the 256 grey values."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from calibrant.errors import ProgramError
from calibrant.models.parts.likelihoods.grey import LEVELS, GreyDistribution, entry_of, grey_values
from calibrant.models.parts.likelihoods.protocol import Likelihood, Shape
from calibrant.models.parts.likelihoods.registry import register_likelihood
from calibrant.registries import Case

HEADS = ("full", "pixel")


class GreyCategorical(GreyDistribution):
    """A categorical distribution of grey values.

    Args:
        logits: log probabilities up to a constant, `(*batch_shape, 256)`.
    """

    def __init__(self, logits: Tensor, validate_args: bool | None = None) -> None:
        self.logits = logits
        super().__init__(logits.shape[:-1], validate_args=validate_args)

    @property
    def like(self) -> Tensor:
        return self.logits

    def log_mass(self, level: Tensor) -> Tensor:
        return entry_of(self.log_masses(), level)

    def log_masses(self) -> Tensor:
        return self.logits.log_softmax(-1)


@register_likelihood(
    "categorical",
    density_of="the grey values k/255 (their probabilities)",
    equations="255 x ~ Categorical(softmax(logits)), 256 logits per entry",
    paper="van den Oord, Kalchbrenner & Kavukcuoglu 2016, arXiv 1601.06759; a decoder of arXiv 2006.13202",
    cases=(
        Case({}, {"x": (1,)}),
        Case({}, {"x": (1, 4, 4)}, name="image"),
        Case({"head": "pixel", "features": 3}, {"x": (1,)}),
        Case({"head": "pixel", "features": 3, "channels": 2}, {"x": (2, 4, 4)}, name="pixel-image"),
    ),
)
class Categorical(Likelihood):
    """Independent entries, each with its own 256 probabilities.

    Args:
        head: "full": the decoder returns 256 logits for every entry. "pixel": it returns `features` numbers for every
            position, and the likelihood turns them into logits by a 1×1 convolution that it learns, for about half the
            time.
        features: numbers per position that the decoder returns for the head "pixel".
        channels: for the head "pixel", number of channels of observations `(channels, …)`, which share their features.
            With 1, every entry is a position of its own, whatever the shape.

    Raises:
        ProgramError: for an unknown head, or numbers that are not positive.
    """

    support = grey_values

    def __init__(self, head: str = "full", features: int = 32, channels: int = 1) -> None:
        super().__init__()
        if head not in HEADS:
            raise ProgramError(f"head={head!r} is unknown; known: {list(HEADS)}")
        if features < 1 or channels < 1:
            raise ProgramError(f"features={features} and channels={channels}: both must be positive")
        self.head, self.features, self.channels = head, features, channels
        if head == "pixel":
            self.logits = nn.Sequential(nn.SiLU(), nn.Linear(features, channels * LEVELS))

    def outputs(self, shape: Shape) -> dict[str, Shape]:
        if self.head == "full":
            return {"logits": (LEVELS, *shape)}
        return {"features": (self.features, *(shape if self.channels == 1 else shape[1:]))}

    def marginals(self, output: Tensor) -> GreyCategorical:
        last = output.movedim(1, -1)
        if self.head == "full":
            return GreyCategorical(last)
        logits = self.logits(last)
        if self.channels == 1:
            return GreyCategorical(logits)
        return GreyCategorical(torch.stack(logits.split(LEVELS, -1), 1))

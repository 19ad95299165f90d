"""Images of a site that are changed, and stay values that the site can have."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from pyro.nn import PyroModule
from torch import Tensor
from torch.distributions import constraints

from calibrant.data.dataset import Data
from calibrant.models.parts.likelihoods.grey import LAST, grey_values
from calibrant.program.environment import cast, defaults, seeded
from calibrant.program.supports import base_support
from calibrant.program.tracing import trace

_BATCH = 4096


@dataclass(frozen=True)
class ImageSupport:
    """The values that a pixel of an observed site can have.

    Attributes:
        kind: "real" or an "interval"; "grey" for k/255, k = 0, …, 255; "whole" numbers; "binary", 0 and 1.
        low: smallest value, −∞ if there is none.
        high: largest value, ∞ if there is none.
    """

    kind: Literal["real", "interval", "grey", "whole", "binary"]
    low: float
    high: float

    def nearest(self, values: Tensor, uniforms: Tensor) -> Tensor:
        """Images with values in the support.

        Real values are unchanged, values outside an interval move to its end, grey values and whole numbers are
        rounded. A binary pixel is drawn again: it is on where its uniform number lies below its value, so that a value
        of 1 or more is always on, and one of 0 or less never. With the same uniforms at every level of a change, images
        differ by the change alone.

        Args:
            values: `(image, *event)`.
            uniforms: `uniforms_of` the images; used for binary pixels only.
        """
        if self.kind == "binary":
            return (uniforms < values).to(values.dtype)
        kept = values.clamp(self.low, self.high)
        if self.kind == "grey":
            return (LAST * kept).round() / LAST
        return kept.round() if self.kind == "whole" else kept


REAL = ImageSupport("real", -torch.inf, torch.inf)


def support_of(program: PyroModule, data: Data, name: str) -> ImageSupport:
    """The values that a pixel of the observed site `name` can have, as its distribution in the program says."""
    some = data[: min(len(data), 2)]
    observed, covariates = some.tensors()
    with torch.no_grad(), seeded(0), defaults(program, observed) as place:
        run = trace(program, len(some), cast(covariates, *place), cast(observed, *place))
    distribution: Any = run.nodes[name]["fn"]
    support = base_support(distribution.support)
    if support is constraints.boolean:
        return ImageSupport("binary", 0.0, 1.0)
    if support is grey_values:
        return ImageSupport("grey", 0.0, 1.0)
    low, high = (_bound(support, side, none) for side, none in (("lower", -torch.inf), ("upper", torch.inf)))
    if support.is_discrete:
        return ImageSupport("whole", low, high)
    return REAL if (low, high) == (REAL.low, REAL.high) else ImageSupport("interval", low, high)


def _bound(support: Any, side: str, none: float) -> float:
    """A bound that all pixels share; the widest one, where pixels have different bounds."""
    found = torch.as_tensor(getattr(support, f"{side}_bound", none), dtype=torch.float64)
    return float(found.min() if side == "lower" else found.max())


def uniforms_of(images: Tensor, seed: int) -> Tensor:
    """A uniform random number for every pixel of images `(image, *event)`, in float64 on the CPU."""
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(images.shape, generator=generator, dtype=torch.float64, device="cpu").to(images.device)


def contrasts_of(data: Data, name: str) -> Tensor:
    """Contrast of all images of a data set in data units, `(image,)`, some of them read at a time."""
    parts = torch.arange(len(data), device="cpu").split(_BATCH)
    return torch.cat([contrast_of_images(data.batch(index)[0][name]) for index in parts])


def contrast_of_images(x: Tensor) -> Tensor:
    """Root-mean-square deviation of each image from its own mean, `(image,)`."""
    return centred(x).flatten(1).square().mean(1).sqrt()


def centred(x: Tensor) -> Tensor:
    """Each image without its mean."""
    return x - x.flatten(1).mean(1).reshape(-1, *[1] * (x.dim() - 1))

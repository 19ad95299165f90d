"""Corruptions of images, in five levels from mild to strong, which we define.

The abstract of Catoni et al. (arXiv 2404.15390) names image corruption; neither its text that is available nor its code
says how images were corrupted. All levels of a corruption use the same random numbers: the noise of a level is that of
the level before, multiplied; occluders grow; pixels that have changed places go on to do so.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from calibrant.errors import InferenceError
from calibrant.evaluation.uncertainty.images import centred, contrast_of_images
from calibrant.streams import stream


@dataclass(frozen=True)
class Canvas:
    """Images `(image, channel, height, width)`, and the numbers of the whole set that corruptions refer to.

    Attributes:
        images: the uncorrupted images.
        contrast: mean over images of the root mean square deviation of their pixels from their mean.
        background: the median pixel of all images, which is black for digits.
        seed: random seed of the corruptions.
    """

    images: Tensor
    contrast: float
    background: float
    seed: int

    @classmethod
    def of(cls, values: Tensor, seed: int) -> Canvas:
        """The images of a site `(image, *event)`.

        Raises:
            InferenceError: for an event that is no image.
        """
        images = values.reshape(len(values), *_sides(tuple(values.shape[1:])))
        return cls(images, float(contrast_of_images(images).mean()), float(images.flatten().median()), seed)

    def generator(self, kind: str) -> torch.Generator:
        return torch.Generator().manual_seed(stream(self.seed, "corruptions", kind))


@dataclass(frozen=True)
class Corruption:
    """One kind of corruption: its five levels from mild to strong, what they count, and the function that does it."""

    levels: tuple[float, ...]
    unit: str
    apply: Callable[[Canvas, float], Tensor]


def add_noise(canvas: Canvas, strength: float) -> Tensor:
    """Independent Gaussian noise in every pixel and channel, with an sd of `strength` times the images' contrast."""
    noise = torch.randn(canvas.images.shape, generator=canvas.generator("noise"), dtype=torch.float64)
    return canvas.images + strength * canvas.contrast * noise.to(canvas.images)


def blur(canvas: Canvas, strength: float) -> Tensor:
    """Gaussian blur with an sd of `strength` times the shorter side; images are continued by their mirror images."""
    *_, height, width = canvas.images.shape
    sd = strength * min(height, width)
    rows, columns = (_blurring(side, sd).to(canvas.images) for side in (height, width))
    return rows @ canvas.images @ columns.T


def occlude(canvas: Canvas, strength: float) -> Tensor:
    """A square in the colour of the background over a share `strength` of each image, at a place of its own.

    It grows around a random pixel and stays within the image.
    """
    count, _, height, width = canvas.images.shape
    place = torch.rand((count, 2), generator=canvas.generator("occlusion"), dtype=torch.float64)
    hidden = torch.ones((count, height, width), dtype=torch.bool)
    for axis, side in enumerate((height, width)):
        length = round(math.sqrt(strength) * side)
        first = (place[:, axis] * (side - length + 1)).long().clamp_max(side - length)[:, None]
        pixels = torch.arange(side)
        along = (pixels >= first) & (pixels < first + length)
        hidden &= along[:, :, None] if axis == 0 else along[:, None, :]
    return torch.where(hidden[:, None].to(canvas.images.device), canvas.background, canvas.images)


def lower_contrast(canvas: Canvas, strength: float) -> Tensor:
    """Every image with a share `strength` of its contrast removed, about its own mean."""
    return canvas.images - strength * centred(canvas.images)


def permute(canvas: Canvas, strength: float) -> Tensor:
    """A share `strength` of each image's pixels, chosen at random, exchanged among themselves; channels stay together.

    Every chosen pixel moves: each takes the place of the next one in a random order, the last that of the first.
    """
    count, channels, height, width = canvas.images.shape
    order = torch.rand((count, height * width), generator=canvas.generator("permutation")).argsort(1)
    chosen = order[:, : round(strength * height * width)].to(canvas.images.device)
    source = torch.arange(height * width, device=canvas.images.device).repeat(count, 1)
    source.scatter_(1, chosen, chosen.roll(-1, 1))
    flat = canvas.images.flatten(2)
    return flat.gather(2, source[:, None].expand(-1, channels, -1)).reshape(canvas.images.shape)


KINDS: Mapping[str, Corruption] = {
    "noise": Corruption((0.125, 0.25, 0.5, 1.0, 2.0), "sd of the noise, in contrasts of the images", add_noise),
    "blur": Corruption((0.03, 0.06, 0.1, 0.16, 0.25), "sd of the blur, in sides of the image", blur),
    "occlusion": Corruption((0.05, 0.1, 0.2, 0.4, 0.8), "share of the image that is hidden", occlude),
    "contrast": Corruption((0.3, 0.5, 0.7, 0.85, 0.95), "share of the contrast that is removed", lower_contrast),
    "permutation": Corruption((0.1, 0.25, 0.5, 0.75, 1.0), "share of the pixels that are exchanged", permute),
}


def corrupted(values: Tensor, kind: str, strength: float, seed: int = 0) -> Tensor:
    """Images of a site, corrupted; values may leave the site's support.

    Args:
        values: `(image, *event)`. The event is `(…, height, width)`, or flat with as many pixels as a square has.
        kind: one of `KINDS`, where the unit of the strength is given.
        strength: how strong the corruption is, for instance one of the levels of the kind.
        seed: random seed, which gives the same random numbers to all strengths.

    Returns:
        Images of the same shape and dtype.

    Raises:
        InferenceError: for an unknown kind, or an event that is no image.
    """
    return known(kind).apply(Canvas.of(values, seed), strength).reshape(values.shape)


def known(kind: str) -> Corruption:
    """The corruption of this name.

    Raises:
        InferenceError: for an unknown name.
    """
    if kind not in KINDS:
        raise InferenceError(f"unknown corruption {kind!r}; there are {', '.join(KINDS)}")
    return KINDS[kind]


def chosen_levels(count: int) -> list[int]:
    """Which of the levels 1 to 5 are used, evenly spaced and with both ends: 1, 3 and 5 if `count` is 3.

    Raises:
        InferenceError: for a count below 2 or above 5.
    """
    if not 2 <= count <= 5:
        raise InferenceError(f"levels={count}: give how many of the five levels are used, from 2 to 5")
    return np.linspace(1, 5, count).round().astype(int).tolist()


def shuffled_across_images(images: Tensor, seed: int = 0) -> Tensor:
    """A control set in which every pixel is shuffled across images, independently of all other pixels.

    Each pixel keeps its distribution over images, and all dependence between pixels is lost (arXiv 2404.15390,
    section 4.3 of its code's experiments).

    Args:
        images: `(image, *event)`.
        seed: random seed for the shuffles.

    Returns:
        As many images of the same shape.
    """
    generator = torch.Generator().manual_seed(stream(seed, "shuffled across images"))
    flat = images.flatten(1)
    order = torch.rand(flat.shape, generator=generator, dtype=torch.float64).argsort(0)
    return flat.gather(0, order.to(images.device)).reshape(images.shape)


def _sides(event: Sequence[int]) -> tuple[int, int, int]:
    """Channels, height and width of an event."""
    if len(event) >= 2:
        return math.prod(event[:-2]), event[-2], event[-1]
    side = math.isqrt(math.prod(event))
    if side < 2 or side * side != math.prod(event):
        raise InferenceError(
            f"the observed site has the event shape {tuple(event)}, which is no image: give images (…, height, width)"
        )
    return 1, side, side


def _blurring(side: int, sd: float) -> Tensor:
    """The matrix `(side, side)` that blurs a row of pixels, whose continuation is mirrored at both ends."""
    reach = math.ceil(5 * sd)
    offsets = torch.arange(-reach, reach + 1, dtype=torch.float64)
    kernel = torch.exp(-0.5 * (offsets / sd) ** 2)
    kernel /= kernel.sum()
    wave = (torch.arange(side)[:, None] + torch.arange(-reach, reach + 1)) % (2 * side)
    source = torch.where(wave < side, wave, 2 * side - 1 - wave)
    return torch.zeros(side, side, dtype=torch.float64).scatter_add_(1, source, kernel.expand(side, -1))

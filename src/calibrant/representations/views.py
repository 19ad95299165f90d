"""Augmented views of images: crops, flips and colours, which depend on the seed, the image and the view alone."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass
from math import exp, log, sqrt

import numpy as np
import torch
from torch import Tensor

from calibrant.errors import RepresentationError
from calibrant.representations.kinds import is_real
from calibrant.streams import stream

_RATIO = (3 / 4, 4 / 3)  # width / height of crops
_TRIES = 10  # crops that do not fit into the image are drawn again as often


@dataclass(frozen=True)
class Views:
    """Random views of images: a crop that is resized to the whole image, a mirror image, other colours.

    The defaults are those with which Kirchhof et al. train (arXiv 2307.03810; arXiv 2402.16569).

    Args:
        area: smallest and largest share of the image that a crop covers; (1, 1) keeps the image. The logarithm of a
            crop's width / height is uniform between log 3/4 and log 4/3.
        flip: probability of the mirror image, left to right.
        jitter: brightness, contrast and saturation are multiplied by factors that are uniform on [1 − jitter,
            1 + jitter], in random order; 0 keeps the colours.

    Raises:
        RepresentationError: for shares or probabilities outside [0, 1], or a jitter that is negative.
    """

    area: tuple[float, float] = (0.08, 1.0)
    flip: float = 0.5
    jitter: float = 0.4

    def __post_init__(self) -> None:
        is_pair = isinstance(self.area, tuple | list) and len(self.area) == 2 and all(map(is_real, self.area))
        if not (is_pair and 0 < self.area[0] <= self.area[1] <= 1):
            raise RepresentationError(f"area={self.area!r} is given, wanted two shares of the image such as (0.08, 1)")
        if not (is_real(self.flip) and 0 <= self.flip <= 1):
            raise RepresentationError(f"flip={self.flip!r} is given, wanted a probability such as 0.5")
        if not (is_real(self.jitter) and 0 <= self.jitter <= 1):
            raise RepresentationError(f"jitter={self.jitter!r} is given, wanted a number from 0 to 1 such as 0.4")

    def __call__(self, images: Tensor, labels: Iterable[object], view: int, seed: int = 0) -> Tensor:
        """One view of every image, in the shape of the images.

        Args:
            images: `(n, channels, height, width)` in [0, 1].
            labels: one label for every image, such as its index in the data set. The random numbers of an image
                depend on its label, on `view` and on `seed`, and not on the other images.
            view: number of the view, from 0.
            seed: random seed for crops, flips and colours.
        """
        key = stream(seed, "views")
        draws = [np.random.default_rng(np.random.Philox(_key(key, label, view))) for label in labels]
        return torch.stack([self._view(image, rng) for image, rng in zip(images, draws, strict=True)])

    def _view(self, image: Tensor, rng: np.random.Generator) -> Tensor:
        from torchvision.transforms.v2 import functional as tv

        height, width = image.shape[1:]
        top, left, rows, columns = self._crop(height, width, rng)
        if (rows, columns) != (height, width):
            image = tv.resized_crop(image, top, left, rows, columns, [height, width], antialias=True)
        if rng.random() < self.flip:
            image = image.flip(2)
        factors, order = rng.uniform(1 - self.jitter, 1 + self.jitter, 3), rng.permutation(3)
        if self.jitter == 0:
            return image
        change = (tv.adjust_brightness, tv.adjust_contrast, tv.adjust_saturation)
        for step in order if len(image) == 3 else order[order < 2]:
            image = change[step](image, float(factors[step]))
        return image

    def _crop(self, height: int, width: int, rng: np.random.Generator) -> tuple[int, int, int, int]:
        """Top, left, height and width of a random crop; the whole image if none of ten fits."""
        if tuple(self.area) == (1, 1):
            return 0, 0, height, width
        for _ in range(_TRIES):
            area = height * width * rng.uniform(*self.area)
            ratio = exp(rng.uniform(log(_RATIO[0]), log(_RATIO[1])))
            rows, columns = round(sqrt(area / ratio)), round(sqrt(area * ratio))
            if 0 < rows <= height and 0 < columns <= width:
                return int(rng.integers(height - rows + 1)), int(rng.integers(width - columns + 1)), rows, columns
        return 0, 0, height, width


def _key(key: int, label: object, view: int) -> int:
    """A number of 128 bits for one view of one image: the key of a generator of its own."""
    found = hashlib.sha256(f"{key} {label} {view}".encode()).digest()
    return int.from_bytes(found[:16], "big")

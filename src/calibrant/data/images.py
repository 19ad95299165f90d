"""Preprocessing that all sets of 8-bit images share: the size of the images, and what their grey values become."""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor
from torch.utils.data import Dataset

from calibrant.data.dataset import Data
from calibrant.data.grey_values import ROW, VALUES, grey_values
from calibrant.errors import DataError
from calibrant.streams import stream

Size = int | tuple[int, int] | None
_KEPT = 2**28  # bytes of resized images that are kept
_RESIZED: OrderedDict[tuple[str, tuple[int, ...], tuple[int, int]], np.ndarray] = OrderedDict()


@dataclass(frozen=True)
class Images:
    """The options of a set of 8-bit images, and the data that they give.

    Images stay 8-bit integers in memory or on the disk; grey values k become real numbers batch by batch.

    Args:
        name: name of the set in messages and reports.
        size: height and width in pixels, or one number for both; None for the size that the images have. Images are
            resized by Pillow with antialiased bilinear weights, and the results are 8-bit integers again, so that the
            values stay on the grid k/255.
        values: "unit" for k/255; "dequantised" for (k + u)/256 with u uniform on [0, 1), for densities of real numbers
            (Theis, van den Oord & Bethge 2016, arXiv 1511.01844); "binarised" for 1 with probability k/255 and 0
            otherwise (Salakhutdinov & Murray 2008); "thresholded" for 1 where k is 128 or more, without random numbers.
            Random numbers are drawn once: they depend on the seed, the image and the pixel alone.
        seed: random seed of the values.

    Raises:
        DataError: for a size or values that are not among these.
    """

    name: str
    size: Any = None
    values: str = "unit"
    seed: int = 0

    def __post_init__(self) -> None:
        if self.values not in VALUES:
            raise DataError(f"{self.name}: values={self.values!r} is given, wanted one of {', '.join(VALUES)}")
        sides = self.size if isinstance(self.size, list | tuple) else [self.size] * 2
        if self.size is not None and not (len(sides) == 2 and all(_is_side(side) for side in sides)):
            raise DataError(
                f"{self.name}: size={self.size!r} is given, wanted a number of pixels such as 28, or height and width "
                "such as [28, 20]"
            )

    def sides(self, stored: tuple[int, ...]) -> tuple[int, int]:
        """Height and width after resizing, for images stored with these."""
        height, width = stored if self.size is None else self.size if not _is_side(self.size) else [self.size] * 2
        return int(height), int(width)

    def resized(self, images: Any) -> Any:
        """Images in the size that was asked for, 8-bit.

        Args:
            images: tensor or array of 8-bit integers, `(n, channels, height, width)`.
        """
        sides = self.sides(tuple(images.shape[2:]))
        return images if sides == tuple(images.shape[2:]) else _all_resized(np.ascontiguousarray(images), sides)

    def data(self, images: Any, labels: Mapping[str, Any] | None = None, first: int = 0) -> Data:
        """The images as the observation `x` with real values, beside their labels.

        Args:
            images: tensor or array of 8-bit integers, `(n, channels, height, width)`.
            labels: key → one label for every image.
            first: number of images of the set that are in other `Data`, so that no two share random numbers.
        """
        arrays = {"x": self.resized(images), **(labels or {})}
        rows = np.arange(first, first + len(arrays["x"]))
        return Data({**arrays, ROW: rows}, transform=self._transform(), name=self.name).select(list(arrays))

    def lazily(self, images: Lazy, coords: Mapping[str, Any] | None = None) -> Data:
        """The images of a `Lazy` data set as the observation `x`, each read when it is needed, beside their labels."""
        return Data(images, None, coords, self._transform(), self.name).select(["x", *images.labels])

    def _transform(self) -> Callable[[dict[str, Tensor]], dict[str, Tensor]]:
        return grey_values(self.values, stream(self.seed, "grey values"))


class Lazy(Dataset):
    """Images that are read one by one: item n is `{"x": images(n)}`, with its labels.

    Args:
        read: the function that reads the image at a position, 8-bit, `(channels, height, width)`.
        rows: position of every image in the whole set.
        labels: key → one label for every position in the whole set.
    """

    def __init__(
        self, read: Callable[[int], np.ndarray], rows: np.ndarray, labels: Mapping[str, np.ndarray] | None = None
    ) -> None:
        self.read, self.rows, self.labels = read, rows, labels or {}

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        row = int(self.rows[index])
        return {"x": self.read(row), **{key: values[row] for key, values in self.labels.items()}, ROW: row}


def _all_resized(images: np.ndarray, sides: tuple[int, int]) -> np.ndarray:
    """Images in another size; the last results are kept, since a set may be loaded with several seeds."""
    key = (hashlib.blake2b(images.data, digest_size=16).hexdigest(), images.shape, sides)
    if key not in _RESIZED:
        found = np.empty((*images.shape[:2], *sides), np.uint8)
        for row, image in enumerate(images):
            found[row] = resize_image(image, sides)
        _RESIZED[key] = found
    _RESIZED.move_to_end(key)
    while len(_RESIZED) > 1 and sum(kept.nbytes for kept in _RESIZED.values()) > _KEPT:
        _RESIZED.popitem(last=False)
    return _RESIZED[key]


def resize_image(image: np.ndarray, sides: tuple[int, int]) -> np.ndarray:
    """One 8-bit image `(channels, height, width)` in another height and width, by antialiased bilinear weights.

    Pillow computes with integers, so that the result is the same on every machine.
    """
    if len(image) == 3:  # all bands at once, which is quicker than one by one
        return _resized(np.ascontiguousarray(image.transpose(1, 2, 0)), sides).transpose(2, 0, 1)
    return np.stack([_resized(band, sides) for band in image])


def _resized(pixels: np.ndarray, sides: tuple[int, int]) -> np.ndarray:
    from PIL import Image

    return np.asarray(Image.fromarray(pixels).resize(sides[::-1], Image.Resampling.BILINEAR))


def _is_side(side: Any) -> bool:
    return isinstance(side, int | np.integer) and not isinstance(side, bool) and bool(side > 0)

"""What the grey values of 8-bit images become: real numbers in [0, 1], or 0 and 1."""

from __future__ import annotations

from collections.abc import Callable, Collection
from math import prod

import numpy as np
import torch
from torch import Tensor

from calibrant.data.arrays import Array, row_blocks

VALUES = ("unit", "dequantised", "binarised", "thresholded")
WORDS = {
    "unit": "read as k/255, from 0 to 1",
    "dequantised": "read as (k + u)/256 with uniform noise u",
    "binarised": "read as 1 with probability k/255, else 0",
    "thresholded": "read as 1 where k is 128 or more, else 0",
}
ROW = "row of the stored images"  # the key under which the place of every image is stored, which no program sees
_BITS = 16  # bits of the uniform number of a pixel
_CHANNELS = (1, 3, 4)
_SMALLEST = 8  # pixels of a side, below which 8-bit values are not taken for an image
Batch = dict[str, Tensor]


def holds_images(value: Array) -> bool:
    """Whether an array holds 8-bit images, with one, three or four channels first or last."""
    if value.dtype not in (torch.uint8, np.uint8) or value.ndim != 4:
        return False
    first, *_, last = shape = tuple(value.shape[1:])
    sides = shape[1:] if first in _CHANNELS else shape[:2] if last in _CHANNELS else (0, 0)
    return min(sides) >= _SMALLEST


def is_binary(value: Array) -> bool:
    """Whether an array of integers holds 0 and 1 alone, as masks and binarised images do."""
    blocks = row_blocks(len(value), prod(value.shape[1:]))
    return all(int(value[rows[0] : rows[-1] + 1].max()) <= 1 for rows in blocks)


def grey_values(values: str, key: int, names: Collection[str] = ("x",)) -> Callable[[Batch], Batch]:
    """A transform of `Data` that makes real numbers of 8-bit grey values.

    Args:
        values: one of `VALUES`, see `calibrant.data.load`.
        key: key of the random numbers, a whole number.
        names: the keys that hold images. "dequantised" and "binarised" need the key `ROW` beside them.
    """

    def transform(batch: Batch) -> Batch:
        return {**batch, **{name: _real(batch, name, values, key) for name in names}}

    return transform


def _real(batch: Batch, name: str, values: str, key: int) -> Tensor:
    grey = batch[name]
    if values == "unit":
        return grey.float() / 255
    if values == "thresholded":
        return (grey >= 128).float()
    return _with_noise(grey, uniform(key, batch[ROW], grey.shape[1:]).to(grey.device), values)


def uniform(key: int, rows: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Uniform whole numbers from 0 to 2^16 − 1, `(len(rows), *shape)`, which depend on the key and the row alone.

    They are the bits of numpy's counter-based generator Philox, the same in every batch and on every machine.
    """
    words = -(-prod(shape) * _BITS // 64)
    drawn = [np.random.Philox(key=key, counter=[0, 0, 0, row]).random_raw(words) for row in rows.tolist()]
    bits = np.stack(drawn).astype("<u8").view("<u2")[:, : prod(shape)]
    return torch.from_numpy(bits.astype(np.int32)).reshape(-1, *shape)


def _with_noise(grey: Tensor, noise: Tensor, values: str) -> Tensor:
    """Grey values k as (k + u)/256, or as 1 with probability k/255, where u is the noise divided by 2^16.

    The integer 2^16·k + noise has 24 bits, which float32 holds exactly: no value is rounded to the next grey value.
    """
    if values == "binarised":
        return (255 * noise < grey.int() * 2**_BITS).float()
    return (grey.int() * 2**_BITS + noise).float() / 2 ** (8 + _BITS)

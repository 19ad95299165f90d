"""Photographs, whitened and cut into patches."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np

from calibrant.data.dataset import Data
from calibrant.data.splits import SMALLEST, interleaved
from calibrant.errors import DataError

CUTOFF = 0.4  # frequency f0 of the whitening filter, in cycles per pixel
BORDER = 16  # width in pixels of the unused border of an image, where the filter also sees the image's mirror
GAP = 8  # pixels between regions; 99.99% of the energy of the filter's response to a pixel lies within this distance
COUNTS = {"train": 30_000, "validation": 3_000, "test": 3_000}


def whiten(image: np.ndarray) -> np.ndarray:
    """Filter a grey image (height, width) with R(f) = f exp(−(f/f0)⁴), f in cycles per pixel.

    The image is continued by its mirror images (which is what the cosine transform does), so opposite edges don't meet.
    """
    from scipy.fft import dctn, idctn

    rows, columns = (np.arange(n) / (2 * n) for n in image.shape)
    frequency = np.hypot(rows[:, None], columns)
    gain = frequency * np.exp(-((frequency / CUTOFF) ** 4))
    return idctn(dctn(image, norm="ortho") * gain, norm="ortho")


def plan_patches(shapes: Sequence[tuple[int, ...]], size: int, seed: int) -> dict[str, np.ndarray]:
    """Choose the patches: split → integers `(patches, 3)`, the image and the row and column of the first pixel.

    Each image is tiled with square regions, 4 × size pixels wide and `GAP` apart. Of the regions of every image, in
    random order, 80/10/10 belong to train, validation and test. The patches of a split lie at different random
    positions in its regions. They overlap one another, so they are not independent (a standard error that treats them
    as independent is too small), but no pixel is in two splits. The filter sees whole images, but less than a
    ten-thousandth of the energy of its response to a pixel reaches across a gap.

    Raises:
        DataError: for a size that is not a positive integer, or that leaves fewer than 10 regions.
    """
    if not isinstance(size, int) or isinstance(size, bool) or size < 1:
        raise DataError(f"size={size!r}: the side of a patch is a positive number of pixels")
    rng = np.random.default_rng(seed)
    regions = np.concatenate([rng.permutation(_regions(i, shape, 4 * size)) for i, shape in enumerate(shapes)])
    if len(regions) < SMALLEST:
        found = f"the images hold {len(regions)} regions of {4 * size}×{4 * size} pixels, {SMALLEST} are needed"
        raise DataError(f"size={size} is too large: {found}; choose a smaller size")
    span = 3 * size + 1  # positions of a patch in a region, along one side
    plan = {}
    for split, members in interleaved(len(regions)).items():
        chosen = rng.choice(len(members) * span**2, COUNTS[split], replace=False)
        region, place = np.divmod(chosen, span**2)
        row, column = np.divmod(place, span)
        plan[split] = regions[members[region]] + np.stack([np.zeros_like(row), row, column], axis=1)
    return plan


def cut_patches(images: Iterable[np.ndarray], plan: dict[str, np.ndarray], size: int) -> dict[str, np.ndarray]:
    """Whiten the images and cut the planned patches: split → `(patches, 1, size, size)`, with training variance 1."""
    patches = {split: np.empty((len(where), 1, size, size), np.float32) for split, where in plan.items()}
    for number, image in enumerate(images):
        windows = np.lib.stride_tricks.sliding_window_view(whiten(image), (size, size))
        for split, where in plan.items():
            here = where[:, 0] == number
            patches[split][here, 0] = windows[where[here, 1], where[here, 2]]
    unit = patches["train"].std(dtype=np.float64)
    return {split: (values / unit).astype(np.float32) for split, values in patches.items()}


def _regions(image: int, shape: tuple[int, ...], side: int) -> np.ndarray:
    """First pixels of the regions of an image: integers (regions, 3), columns image, row, column."""
    rows, columns = (np.arange(BORDER, length - BORDER - side + 1, side + GAP) for length in shape)
    return np.array([(image, row, column) for row in rows for column in columns], dtype=np.int64).reshape(-1, 3)


def patch_data(
    name: str, images: Sequence[str], patches: dict[str, np.ndarray], plan: dict[str, np.ndarray]
) -> dict[str, Data]:
    labels = np.array(images)
    return {
        split: Data(
            {"x": patches[split]},
            coords={"image": labels[where[:, 0]], "row": where[:, 1], "column": where[:, 2]},
            name=name,
        )
        for split, where in plan.items()
    }

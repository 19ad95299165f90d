"""CelebA."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path

import numpy as np

from calibrant.data.dataset import Data
from calibrant.data.images import Images, Lazy, Size, resize_image
from calibrant.data.labelled_images import read_part
from calibrant.data.registry import register_data
from calibrant.data.splits import SPLITS
from calibrant.errors import DataError
from calibrant.registries import Case

HEIGHT, WIDTH = 218, 178


@register_data(
    "celeba",
    description="202,599 photographs of faces, colour, 64×64 (the middle 148×148 pixels of 178×218)",
    source="Liu, Luo, Wang & Tang 2015, arXiv 1411.7766",
    licence="for non-commercial research",
    folder="celeba",
    downloads=True,
    keys={"x": ((3, 64, 64), "float32")},
    cases=(Case({"size": 28, "crop": 140}, {"x": (3, 28, 28)}),),
)
def celeba(
    root: Path, download: bool, size: Size = 64, crop: int = 148, values: str = "unit", seed: int = 0
) -> dict[str, Data]:
    """CelebA, aligned and cropped: `x` (3, 64, 64); the published splits of 162,770 / 19,867 / 19,962 photographs.

    The middle square of `crop` pixels (140 and 148 are usual) is resized. Photographs are read when they are needed,
    from the files of torchvision's layout: celeba/img_align_celeba/NAME.jpg and celeba/list_eval_partition.txt.
    """
    images, folder = Images("celeba", size, values, seed), root / "celeba"
    if not (isinstance(crop, int) and 0 < crop <= WIDTH):
        raise DataError(f"celeba: crop={crop!r} is given, wanted a number of pixels from 1 to {WIDTH}, such as 148")
    if download:
        from torchvision.datasets import CelebA

        read_part("celeba", folder, CelebA, root, True, split="all")
    names, parts = _published(folder)
    read = partial(_photograph, folder / "img_align_celeba", names, images, crop)
    return {split: images.lazily(Lazy(read, np.flatnonzero(parts == part))) for part, split in enumerate(SPLITS)}


def _published(folder: Path) -> tuple[list[str], np.ndarray]:
    """Names of the photographs, and the split of each: 0 training, 1 validation, 2 test."""
    table = folder / "list_eval_partition.txt"
    if not table.is_file() or not (folder / "img_align_celeba").is_dir():
        raise DataError(
            f"celeba: no complete copy in {folder}: pass download=True (--download), put list_eval_partition.txt and "
            "the folder img_align_celeba there, or give another root (root=, --data-root, CALIBRANT_DATA)"
        )
    rows = [line.split() for line in table.read_text().splitlines() if line.strip()]
    if {len(row) for row in rows} != {2} or {row[1] for row in rows} != {"0", "1", "2"}:
        raise DataError(f"celeba: {table} does not hold lines such as '000001.jpg 0': copy it again")
    return [row[0] for row in rows], np.array([int(row[1]) for row in rows])


def _photograph(folder: Path, names: Sequence[str], images: Images, crop: int, row: int) -> np.ndarray:
    """One photograph, cropped and resized, 8-bit, `(3, height, width)`."""
    from PIL import Image

    path = folder / names[row]
    try:
        with Image.open(path) as image:
            pixels = np.asarray(image.convert("RGB")).transpose(2, 0, 1)
    except OSError as error:
        raise DataError(f"celeba: {path} is missing or damaged: copy it again") from error
    if pixels.shape[1:] != (HEIGHT, WIDTH):
        raise DataError(f"celeba: {path} has {pixels.shape[1:]} pixels, not {(HEIGHT, WIDTH)}: copy it again")
    top, left = (HEIGHT - crop) // 2, (WIDTH - crop) // 2
    return resize_image(pixels[:, top : top + crop, left : left + crop], images.sides((crop, crop)))

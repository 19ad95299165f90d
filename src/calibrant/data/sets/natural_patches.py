"""Whitened patches of photographs that come with scikit-image."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from calibrant.data.dataset import Data
from calibrant.data.photographs import cut_patches, patch_data, plan_patches
from calibrant.data.registry import register_data
from calibrant.errors import DataError
from calibrant.registries import Case

# The photographs that come inside scikit-image's package; its other images are drawings, documents, micrographs, or
# nearly empty (night sky, moon, a single cell).
PHOTOGRAPHS = (
    "astronaut.png",
    "brick.png",
    "camera.png",
    "chelsea.png",
    "coffee.png",
    "grass.png",
    "gravel.png",
    "motorcycle_left.png",
)


@register_data(
    "natural-patches",
    description="36,000 whitened 16×16 patches of 8 photographs, embedded (no download)",
    source="photographs of scikit-image; whitened as in Olshausen & Field 1997",
    licence="CC0 or public domain; the motorcycle: Middlebury Stereo 2014 (Scharstein et al.), as in scikit-image",
    keys={"x": ((1, 16, 16), "float32")},
    cases=(Case({"size": 12}, {"x": (1, 12, 12)}),),
)
def natural_patches(root: Path, download: bool, size: int = 16, seed: int = 0) -> dict[str, Data]:
    """Whitened patches of the photographs that come with scikit-image; needs neither files nor network.

    `x` has shape (1, size, size), float32; 30,000 / 3,000 / 3,000 patches. The brightness is used
    as stored: its gamma correction takes the place of the logarithm. `seed` determines the regions and positions; see
    `plan_patches` for the splits.

    Raises:
        DataError: for a size that the photographs are too small for.
    """
    images = [_photograph(name) for name in PHOTOGRAPHS]
    names = [Path(name).stem for name in PHOTOGRAPHS]
    plan = plan_patches([image.shape for image in images], size, seed)
    return patch_data("natural-patches", names, cut_patches(images, plan, size), plan)


def _photograph(file: str) -> np.ndarray:
    """Read a photograph from scikit-image's package folder (never its download cache), grey, from 0 to 1."""
    import skimage
    from skimage.color import rgb2gray
    from skimage.io import imread
    from skimage.util import img_as_float

    path = Path(skimage.__file__).parent / "data" / file
    if not path.is_file():
        raise DataError(f"scikit-image lacks its image {path}: install its wheel again")
    image = img_as_float(imread(path))
    return rgb2gray(image) if image.ndim == 3 else image

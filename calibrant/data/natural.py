"""Patches of whitened natural images.

Each whole image goes through the filter R(f) = f exp(−(f/f0)⁴) of Olshausen & Field 1997 (Vision Research 37, 3311–25).
It flattens a 1/f² power spectrum below f0 = 0.4 cycles per pixel (200 per picture of 512 pixels) and cuts off what lies
above. Photographs fall faster than that at the frequencies of small patches, so their power, about f^−3.2 between 0.1
and 0.25 cycles per pixel, is left at f^−1.4 (f^−0.9 but for the cut-off). R(0) = 0 takes out the mean of the image, so
nothing is subtracted from a patch; and one gain serves all images of a set, so that patches differ in contrast as they
do in nature. The unit of `x` is the standard deviation of the training pixels.
"""

from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np

from calibrant.data.dataset import Data
from calibrant.data.registry import register_data
from calibrant.data.splits import SMALLEST, interleaved
from calibrant.errors import DataError

CUTOFF = 0.4  # f0 in cycles per pixel
BORDER = 16  # pixels left out along the edges of an image, where the filter has seen the image's mirror
GAP = 8  # pixels between regions; 99.99% of the energy of the filter's response to a pixel lies nearer than that
COUNTS = {"train": 30_000, "validation": 3_000, "test": 3_000}

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
VAN_HATEREN_SHAPE = (1024, 1536)


@register_data(
    "natural-patches",
    description="36,000 whitened 16×16 patches of 8 photographs, embedded (no download)",
    source="photographs of scikit-image; whitened as in Olshausen & Field 1997",
    licence="CC0 or public domain; the motorcycle: Middlebury Stereo 2014 (Scharstein et al.), as in scikit-image",
)
def natural_patches(root: Path, download: bool, size: int = 16, seed: int = 0) -> dict[str, Data]:
    """Whitened patches of the photographs that scikit-image carries; needs neither files nor network.

    `x` has shape (1, size, size), float32; 30,000 / 3,000 / 3,000 patches. The brightness is what the files hold, whose
    gamma stands in for the logarithm. `seed` chooses regions and positions, see `plan_patches` for the splits.

    Raises:
        DataError: for a size that the photographs are too small for.
    """
    images = [_photograph(name) for name in PHOTOGRAPHS]
    names = [Path(name).stem for name in PHOTOGRAPHS]
    plan = plan_patches([image.shape for image in images], size, seed)
    return _patch_data("natural-patches", names, cut_patches(images, plan, size), plan)


@register_data(
    "van-hateren",
    description="36,000 whitened 16×16 patches of van Hateren's calibrated outdoor images, from their .iml files",
    source="van Hateren & van der Schaaf 1998, Proc. R. Soc. B 265, 359–366",
    licence="free for scientific, non-commercial use, with citation",
    folder="van-hateren",
)
def van_hateren(root: Path, download: bool, size: int = 16, seed: int = 0) -> dict[str, Data]:
    """Whitened patches of log intensity from every ROOT/van-hateren/imk*.iml; otherwise like `natural_patches`.

    Raises:
        DataError: for a missing folder, a file of another length, or a size that the images are too small for.
    """
    folder = root / "van-hateren"
    files = sorted(folder.glob("imk*.iml"))
    if not files:
        raise DataError(
            f"van-hateren: there is no imk*.iml in {folder}, and no automatic download: put van Hateren's images "
            "there, or name the folder above them (root=, --data-root, CALIBRANT_DATA)"
        )
    plan = plan_patches([VAN_HATEREN_SHAPE] * len(files), size, seed)
    patches = cut_patches(map(_log_intensity, files), plan, size)
    return _patch_data("van-hateren", [file.stem for file in files], patches, plan)


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
    """Where every patch is cut: split to integers (patches, 3), the image and the row and column of the first pixel.

    Each image is tiled with square regions, 4 × size pixels wide and `GAP` apart; of every image's regions, chosen at
    random, 80/10/10 belong to train, validation and test. A split's patches lie at different random positions in its
    regions. They overlap one another, so they are not independent (a standard error that takes them so is too small),
    but no pixel is in two splits. The filter sees whole images, but less
    than a ten-thousandth of the energy of its response to a pixel reaches across a gap.

    Raises:
        DataError: for a size that is no positive integer, or that leaves fewer than 10 regions.
    """
    if not isinstance(size, int) or isinstance(size, bool) or size < 1:
        raise DataError(f"size={size!r}: the side of a patch is a positive number of pixels")
    rng = np.random.default_rng(seed)
    regions = np.concatenate([rng.permutation(_regions(i, shape, 4 * size)) for i, shape in enumerate(shapes)])
    if len(regions) < SMALLEST:
        found = f"the images hold {len(regions)} regions of {4 * size}×{4 * size} pixels, {SMALLEST} are needed"
        raise DataError(f"size={size} is too large: {found}; take a smaller size")
    span = 3 * size + 1  # positions of a patch in a region, along one side
    plan = {}
    for split, members in interleaved(len(regions)).items():
        chosen = rng.choice(len(members) * span**2, COUNTS[split], replace=False)
        region, place = np.divmod(chosen, span**2)
        row, column = np.divmod(place, span)
        plan[split] = regions[members[region]] + np.stack([np.zeros_like(row), row, column], axis=1)
    return plan


def cut_patches(images: Iterable[np.ndarray], plan: dict[str, np.ndarray], size: int) -> dict[str, np.ndarray]:
    """Whiten images one by one and cut the planned patches: split to (patches, 1, size, size), training variance 1."""
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


def _patch_data(
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


def _photograph(file: str) -> np.ndarray:
    """A photograph out of scikit-image's package folder (never its download cache), grey, from 0 to 1."""
    import skimage
    from skimage.color import rgb2gray
    from skimage.io import imread
    from skimage.util import img_as_float

    path = Path(skimage.__file__).parent / "data" / file
    if not path.is_file():
        raise DataError(f"scikit-image lacks its image {path}: install its wheel again")
    image = img_as_float(imread(path))
    return rgb2gray(image) if image.ndim == 3 else image


def _log_intensity(path: Path) -> np.ndarray:
    """Log of the linear intensity in an .iml file (big-endian 16-bit integers); 1 is added for the few zeros."""
    raw = path.read_bytes()
    height, width = VAN_HATEREN_SHAPE
    if len(raw) != 2 * height * width:
        raise DataError(f"{path} has {len(raw)} bytes, not the {2 * height * width} of an .iml image: copy it again")
    return np.log1p(np.frombuffer(raw, ">u2").reshape(height, width).astype(np.float64))

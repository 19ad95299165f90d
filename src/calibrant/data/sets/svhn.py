"""SVHN."""

from __future__ import annotations

from pathlib import Path

from calibrant.data.dataset import Data
from calibrant.data.images import Images, Size
from calibrant.data.labelled_images import published_splits, read_part
from calibrant.data.registry import register_data
from calibrant.registries import Case


@register_data(
    "svhn",
    description="99,289 house numbers cut to single digits, 32×32, colour, labelled",
    source="Netzer et al. 2011",
    licence="for non-commercial use",
    folder="SVHN",
    downloads=True,
    keys={"x": ((3, 32, 32), "float32"), "y": ((), "int64")},
    cases=(Case({"size": 28}, {"x": (3, 28, 28), "y": ()}, name="as-in-the-sigma-vae"),),
)
def svhn(root: Path, download: bool, size: Size = None, values: str = "unit", seed: int = 0) -> dict[str, Data]:
    """SVHN, cropped digits: `x` (3, 32, 32), `y` 0 to 9; the last tenth of the training images is for validation."""
    from torchvision.datasets import SVHN

    folder = root / "SVHN"
    parts = [read_part("svhn", folder, SVHN, folder, download, split=split) for split in ("train", "test")]
    return published_splits(Images("svhn", size, values, seed), *((part.data, part.labels) for part in parts))

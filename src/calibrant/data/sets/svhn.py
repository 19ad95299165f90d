"""SVHN."""

from __future__ import annotations

from pathlib import Path

from calibrant.data.dataset import Data
from calibrant.data.labelled_images import published_splits, read_part
from calibrant.data.registry import register_data


@register_data(
    "svhn",
    description="99,289 house numbers cut to single digits, 32×32, colour, labelled",
    source="Netzer et al. 2011",
    licence="for non-commercial use",
    folder="SVHN",
    downloads=True,
    keys={"x": ((3, 32, 32), "float32"), "y": ((), "int64")},
)
def svhn(root: Path, download: bool) -> dict[str, Data]:
    """SVHN, cropped digits: `x` (3, 32, 32), `y` 0 to 9; the last tenth of the training images is for validation."""
    from torchvision.datasets import SVHN

    folder = root / "SVHN"
    parts = [read_part("svhn", folder, SVHN, folder, download, split=split) for split in ("train", "test")]
    return published_splits("svhn", *((part.data, part.labels) for part in parts))

"""CIFAR-10."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from calibrant.data.dataset import Data
from calibrant.data.images import Images, Size
from calibrant.data.labelled_images import published_splits, read_part
from calibrant.data.registry import register_data
from calibrant.registries import Case


@register_data(
    "cifar10",
    description="60,000 photographs of 10 kinds of things, 32×32, colour, labelled",
    source="Krizhevsky 2009",
    licence="none stated; cite the technical report",
    folder="cifar-10-batches-py",
    downloads=True,
    keys={"x": ((3, 32, 32), "float32"), "y": ((), "int64")},
    cases=(Case({"size": 28}, {"x": (3, 28, 28), "y": ()}, name="as-in-the-sigma-vae"),),
)
def cifar10(root: Path, download: bool, size: Size = None, values: str = "unit", seed: int = 0) -> dict[str, Data]:
    """CIFAR-10: `x` (3, 32, 32), `y` 0 to 9; the last 5,000 training images are the validation set."""
    from torchvision.datasets import CIFAR10

    folder = root / "cifar-10-batches-py"
    parts = [read_part("cifar10", folder, CIFAR10, root, download, train=train) for train in (True, False)]
    return published_splits(
        Images("cifar10", size, values, seed),
        *((part.data.transpose(0, 3, 1, 2), np.asarray(part.targets)) for part in parts),
    )

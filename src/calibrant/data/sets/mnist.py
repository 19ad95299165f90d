"""MNIST."""

from __future__ import annotations

from pathlib import Path

from calibrant.data.dataset import Data
from calibrant.data.images import Images, Size
from calibrant.data.labelled_images import published_splits, read_part
from calibrant.data.registry import register_data
from calibrant.registries import Case


@register_data(
    "mnist",
    description="70,000 handwritten digits, 28×28, grey, labelled",
    source="LeCun, Bottou, Bengio & Haffner 1998",
    licence="CC BY-SA 3.0",
    folder="MNIST/raw",
    downloads=True,
    keys={"x": ((1, 28, 28), "float32"), "y": ((), "int64")},
    cases=(Case({"size": 14, "values": "binarised"}, {"x": (1, 14, 14), "y": ()}),),
)
def mnist(root: Path, download: bool, size: Size = None, values: str = "unit", seed: int = 0) -> dict[str, Data]:
    """MNIST: `x` (1, 28, 28), `y` 0 to 9; the last 6,000 training images are the validation set."""
    from torchvision.datasets import MNIST

    parts = [read_part("mnist", root / "MNIST/raw", MNIST, root, download, train=train) for train in (True, False)]
    return published_splits(
        Images("mnist", size, values, seed), *((part.data[:, None], part.targets) for part in parts)
    )

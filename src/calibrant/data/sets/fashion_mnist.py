"""Fashion-MNIST."""

from __future__ import annotations

from pathlib import Path

from calibrant.data.dataset import Data
from calibrant.data.images import Images, Size
from calibrant.data.labelled_images import published_splits, read_part
from calibrant.data.registry import register_data
from calibrant.registries import Case


@register_data(
    "fashion-mnist",
    description="70,000 articles of clothing, 28×28, grey, labelled",
    source="Xiao, Rasul & Vollgraf 2017",
    licence="MIT",
    folder="FashionMNIST/raw",
    downloads=True,
    keys={"x": ((1, 28, 28), "float32"), "y": ((), "int64")},
    cases=(Case({"values": "dequantised"}, {"x": (1, 28, 28), "y": ()}),),
)
def fashion_mnist(
    root: Path, download: bool, size: Size = None, values: str = "unit", seed: int = 0
) -> dict[str, Data]:
    """Fashion-MNIST: `x` (1, 28, 28), `y` 0 to 9; the last 6,000 training images are the validation set."""
    from torchvision.datasets import FashionMNIST

    folder = root / "FashionMNIST/raw"
    parts = [read_part("fashion-mnist", folder, FashionMNIST, root, download, train=train) for train in (True, False)]
    return published_splits(
        Images("fashion-mnist", size, values, seed), *((part.data[:, None], part.targets) for part in parts)
    )

"""Chest X-rays of MedMNIST."""

from __future__ import annotations

from pathlib import Path

from calibrant.data.dataset import Data
from calibrant.data.files import read_arrays
from calibrant.data.images import Images, Size
from calibrant.data.registry import register_data
from calibrant.errors import DataError
from calibrant.registries import Case

PARTS = {"train": "train", "validation": "val", "test": "test"}
KEYS = ("images", "labels")
SOURCE = "Yang et al. 2023, MedMNIST v2, Scientific Data 10, 41"


@register_data(
    "chest-mnist",
    description="112,120 frontal chest X-rays, 28×28, grey, with 14 findings each",
    source=SOURCE,
    licence="CC BY 4.0",
    folder="chest-mnist",
    keys={"x": ((1, 28, 28), "float32"), "y": ((14,), "int64")},
    cases=(Case({"size": 16, "values": "binarised"}, {"x": (1, 16, 16), "y": (14,)}),),
)
def chest_mnist(root: Path, download: bool, size: Size = None, values: str = "unit", seed: int = 0) -> dict[str, Data]:
    """ChestMNIST from ROOT/chest-mnist/chestmnist.npz, the published file: `x` (1, 28, 28), `y` 14 findings, 0 or 1."""
    return _splits(root / "chest-mnist", "chest-mnist", Images("chest-mnist", size, values, seed))


@register_data(
    "pneumonia-mnist",
    description="5,856 chest X-rays of children, 28×28, grey, labelled healthy or pneumonia",
    source=SOURCE,
    licence="CC BY 4.0",
    folder="pneumonia-mnist",
    keys={"x": ((1, 28, 28), "float32"), "y": ((), "int64")},
    cases=(Case({"size": 16, "values": "binarised"}, {"x": (1, 16, 16), "y": ()}),),
)
def pneumonia_mnist(
    root: Path, download: bool, size: Size = None, values: str = "unit", seed: int = 0
) -> dict[str, Data]:
    """PneumoniaMNIST from the one .npz file in ROOT/pneumonia-mnist: `x` (1, 28, 28), `y` 1 for pneumonia."""
    return _splits(root / "pneumonia-mnist", "pneumonia-mnist", Images("pneumonia-mnist", size, values, seed))


def _splits(folder: Path, name: str, images: Images) -> dict[str, Data]:
    """The published splits of a file of MedMNIST."""
    files = sorted(folder.glob("*.npz"))
    if len(files) != 1:
        raise DataError(
            f"{name}: {folder} holds {len(files)} .npz files, wanted the one that MedMNIST publishes, and there is no "
            "automatic download: put it there, or give another root (root=, --data-root, CALIBRANT_DATA)"
        )
    arrays = read_arrays(files[0])
    if lost := [f"{part}_{what}" for part in PARTS.values() for what in KEYS if f"{part}_{what}" not in arrays]:
        raise DataError(f"{name}: {files[0]} lacks the array {lost[0]}: put the file there that MedMNIST publishes")
    splits, first = {}, 0
    for split, part in PARTS.items():
        x, y = (arrays[f"{part}_{what}"] for what in KEYS)
        if x.dtype != "uint8" or x.ndim != 3:
            raise DataError(f"{name}: {files[0]} holds images {x.shape} of {x.dtype}, wanted grey images of 8 bits")
        labels = y.astype("int64")
        splits[split] = images.data(x[:, None], {"y": labels[:, 0] if labels.shape[1] == 1 else labels}, first)
        first += len(x)
    return splits

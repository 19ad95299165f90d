"""Labelled image sets: `x` (channels, height, width) in [0, 1] and the class `y`."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from calibrant.data.dataset import Data
from calibrant.data.registry import register_data
from calibrant.data.splits import random_splits
from calibrant.errors import DataError


@register_data(
    "digits",
    description="1,797 handwritten digits, 8×8, grey, labelled; embedded (no download)",
    source="scikit-learn; Alpaydin & Kaynak 1998, UCI Optical Recognition of Handwritten Digits",
    licence="CC BY 4.0",
)
def digits(root: Path, download: bool, seed: int = 0) -> dict[str, Data]:
    """scikit-learn's digits: `x` (1, 8, 8) in [0, 1], `y` 0 to 9; seeded 80/10/10 split, stratified by digit."""
    from sklearn.datasets import load_digits

    bunch = load_digits()
    x = (bunch.images[:, None] / 16).astype(np.float32)
    return random_splits(Data({"x": x, "y": bunch.target}, name="digits"), seed, labels=bunch.target)


@register_data(
    "mnist",
    description="70,000 handwritten digits, 28×28, grey, labelled",
    source="LeCun, Bottou, Bengio & Haffner 1998",
    licence="CC BY-SA 3.0",
    folder="MNIST/raw",
    downloads=True,
)
def mnist(root: Path, download: bool) -> dict[str, Data]:
    """MNIST: `x` (1, 28, 28), `y` 0 to 9; the last 6,000 training images are the validation set."""
    from torchvision.datasets import MNIST

    parts = [_read("mnist", root / "MNIST/raw", MNIST, root, download, train=train) for train in (True, False)]
    return _splits("mnist", *((part.data[:, None], part.targets) for part in parts))


@register_data(
    "fashion-mnist",
    description="70,000 articles of clothing, 28×28, grey, labelled",
    source="Xiao, Rasul & Vollgraf 2017",
    licence="MIT",
    folder="FashionMNIST/raw",
    downloads=True,
)
def fashion_mnist(root: Path, download: bool) -> dict[str, Data]:
    """Fashion-MNIST: `x` (1, 28, 28), `y` 0 to 9; the last 6,000 training images are the validation set."""
    from torchvision.datasets import FashionMNIST

    folder = root / "FashionMNIST/raw"
    parts = [_read("fashion-mnist", folder, FashionMNIST, root, download, train=train) for train in (True, False)]
    return _splits("fashion-mnist", *((part.data[:, None], part.targets) for part in parts))


@register_data(
    "cifar10",
    description="60,000 photographs of 10 kinds of things, 32×32, colour, labelled",
    source="Krizhevsky 2009",
    licence="none stated; cite the technical report",
    folder="cifar-10-batches-py",
    downloads=True,
)
def cifar10(root: Path, download: bool) -> dict[str, Data]:
    """CIFAR-10: `x` (3, 32, 32), `y` 0 to 9; the last 5,000 training images are the validation set."""
    from torchvision.datasets import CIFAR10

    folder = root / "cifar-10-batches-py"
    parts = [_read("cifar10", folder, CIFAR10, root, download, train=train) for train in (True, False)]
    return _splits("cifar10", *((part.data.transpose(0, 3, 1, 2), np.asarray(part.targets)) for part in parts))


@register_data(
    "svhn",
    description="99,289 house numbers cut to single digits, 32×32, colour, labelled",
    source="Netzer et al. 2011",
    licence="for non-commercial use",
    folder="SVHN",
    downloads=True,
)
def svhn(root: Path, download: bool) -> dict[str, Data]:
    """SVHN, cropped digits: `x` (3, 32, 32), `y` 0 to 9; the last tenth of the training images is for validation."""
    from torchvision.datasets import SVHN

    folder = root / "SVHN"
    parts = [_read("svhn", folder, SVHN, folder, download, split=split) for split in ("train", "test")]
    return _splits("svhn", *((part.data, part.labels) for part in parts))


def _read(name: str, folder: Path, reader: Callable[..., Any], root: Path, download: bool, **part: Any) -> Any:
    """One part of a torchvision data set; whatever goes wrong with its files says where they belong."""
    try:
        return reader(root, download=download, **part)
    except (RuntimeError, OSError, ValueError, AssertionError, EOFError) as error:
        if download:
            raise DataError(f"{name}: the download to {folder} failed: {error}") from error
        raise DataError(
            f"{name}: no complete copy in {folder}: pass download=True (--download), put the files there, or name "
            "another root (root=, --data-root, CALIBRANT_DATA)"
        ) from error


def _splits(name: str, train: tuple[Any, Any], test: tuple[Any, Any]) -> dict[str, Data]:
    """The published test set, and a fixed validation set: the last tenth of the published training set."""
    both = Data({"x": train[0], "y": train[1]}, transform=_unit_interval, name=name)
    first_held_out = len(both) - len(both) // 10
    test_data = Data({"x": test[0], "y": test[1]}, transform=_unit_interval, name=name)
    return {"train": both[:first_held_out], "validation": both[first_held_out:], "test": test_data}


def _unit_interval(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """8-bit images from 0 to 1, in float32 whatever dtype follows, so that every dtype sees the same values."""
    return {**batch, "x": batch["x"].float() / 255}

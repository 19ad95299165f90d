"""Labelled image sets that torchvision reads: `x` (channels, height, width) in [0, 1] and the class `y`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import Tensor

from calibrant.data.dataset import Data
from calibrant.errors import DataError


def read_part(name: str, folder: Path, reader: Callable[..., Any], root: Path, download: bool, **part: Any) -> Any:
    """Read one part of a torchvision data set; an error with its files says where they belong."""
    try:
        return reader(root, download=download, **part)
    except (RuntimeError, OSError, ValueError, AssertionError, EOFError) as error:
        if download:
            raise DataError(f"{name}: the download to {folder} failed: {error}") from error
        raise DataError(
            f"{name}: no complete copy in {folder}: pass download=True (--download), put the files there, or give "
            "another root (root=, --data-root, CALIBRANT_DATA)"
        ) from error


def published_splits(name: str, train: tuple[Any, Any], test: tuple[Any, Any]) -> dict[str, Data]:
    """The published test set, and a fixed validation set: the last tenth of the published training set."""
    both = Data({"x": train[0], "y": train[1]}, transform=_unit_interval, name=name)
    first_held_out = len(both) - len(both) // 10
    test_data = Data({"x": test[0], "y": test[1]}, transform=_unit_interval, name=name)
    return {"train": both[:first_held_out], "validation": both[first_held_out:], "test": test_data}


def _unit_interval(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """Scale 8-bit images to [0, 1], in float32, so that their values are the same in every dtype."""
    return {**batch, "x": batch["x"].float() / 255}

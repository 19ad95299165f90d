"""Labelled image sets that torchvision reads: `x` (channels, height, width) and the class `y`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from calibrant.data.dataset import Data
from calibrant.data.images import Images
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


def published_splits(images: Images, train: tuple[Any, Any], test: tuple[Any, Any]) -> dict[str, Data]:
    """The published test set, and a fixed validation set: the last tenth of the published training set."""
    both = images.data(train[0], {"y": train[1]})
    first_held_out = len(both) - len(both) // 10
    test_data = images.data(test[0], {"y": test[1]}, first=len(both))
    return {"train": both[:first_held_out], "validation": both[first_held_out:], "test": test_data}

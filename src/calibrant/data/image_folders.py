"""Folders of photographs of any size, one folder for each class: read one by one, when they are needed."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from calibrant.data.dataset import Data
from calibrant.data.images import Images, Lazy, Size, resize_image
from calibrant.data.splits import random_splits
from calibrant.errors import DataError

ENDINGS = (".jpg", ".jpeg", ".png")
CLASSES = ("all", "apart", "train", "test")
_EVERY = 5  # of the training classes that stand apart, one image in five is a validation image


def load_folder(folder: Path, seed: int, options: Mapping[str, Any]) -> dict[str, Data]:
    """The splits of FOLDER/CLASS/NAME.jpg, .jpeg or .png, with the options of `image_folder`.

    Raises:
        DataError: for a folder that is missing or holds no such images, and for unknown options.
    """
    known = [name for name in inspect.signature(image_folder).parameters if name != "folder"]
    if unknown := [name for name in options if name not in known]:
        raise DataError(f"{folder} has no option {', '.join(map(repr, unknown))}: its options are {', '.join(known)}")
    return image_folder(folder, **{"seed": seed, **options})


def image_folder(
    folder: Path, size: Size = 128, values: str = "unit", classes: str = "all", seed: int = 0
) -> dict[str, Data]:
    """Photographs FOLDER/CLASS/NAME.jpg, .jpeg or .png: `x` (3, size, size), `y` the class, from 0 in sorted order."""
    files = files_by_class(folder)
    if not files:
        raise DataError(
            f"{folder} holds no images: put them into one folder for each class, CLASS/NAME.jpg, .jpeg or .png"
        )
    names = [name for name, file in files]
    data = photographs(folder.name, folder, [file for _, file in files], names, Images(folder.name, size, values, seed))
    return class_splits(folder.name, data, names, classes, seed)


def files_by_class(folder: Path, without: Sequence[str] = ()) -> list[tuple[str, str]]:
    """(class, CLASS/NAME) of all images, sorted; hidden files and the classes `without` are ignored.

    Raises:
        DataError: for a folder that is missing.
    """
    if not folder.is_dir():
        raise DataError(f"there is no folder {folder}: give one that holds a folder of images for each class")
    found = [part for part in sorted(folder.iterdir()) if part.is_dir() and part.name not in without]
    return [
        (part.name, f"{part.name}/{file.name}")
        for part in found
        for file in sorted(part.iterdir())
        if file.suffix.lower() in ENDINGS and not file.name.startswith(".")
    ]


def photographs(name: str, folder: Path, files: Sequence[str], names: Sequence[str], images: Images) -> Data:
    """Photographs as `x`, each read when it is needed, and their classes as `y`, numbered in sorted order.

    Args:
        name: name of the set in messages and reports.
        folder: where the files lie.
        files: paths of the files below the folder.
        names: the class of each file.
        images: options of the set; the middle square of a photograph is resized.

    Returns:
        The coordinates are `class` and `file`, the names that were given.
    """
    if images.size is None:
        raise DataError(f"{name}: size=None is given, but photographs differ in size: give a number of pixels")
    y = np.unique(names, return_inverse=True)[1].astype(np.int64)
    read = partial(_middle_square, name, folder, files, images)
    return images.lazily(Lazy(read, np.arange(len(files)), {"y": y}), {"class": names, "file": files})


def class_splits(name: str, data: Data, names: Sequence[str], classes: str, seed: int) -> dict[str, Data]:
    """Splits of labelled photographs, with training and test classes mixed or apart.

    Args:
        name: name of the set in messages.
        data: all images.
        names: class of each image. The first half of the classes, in sorted order (the larger one of an odd number),
            are training classes, the others test classes, as in Kirchhof et al. 2023 (arXiv 2307.03810).
        classes: "all": seeded 80/10/10 split of every class. "apart": the test set is all images of the test classes,
            of which no image is in the other splits, and the validation set every fifth image of the training classes;
            this is for retrieval among classes that were not seen. "train", "test": seeded 80/10/10 split of these
            classes alone.
        seed: random seed for the split.

    Raises:
        DataError: for `classes` that is not among these, and for a half without classes.
    """
    if classes not in CLASSES:
        raise DataError(f"{name}: classes={classes!r} is given, wanted one of {', '.join(CLASSES)}")
    if classes == "all":
        return random_splits(data, seed, labels=names)
    present, y = np.unique(names, return_inverse=True)
    if len(present) < 2:
        raise DataError(f"{name}: classes={classes!r} needs two classes or more, and there is {len(present)}")
    first = y < -(-len(present) // 2)
    if classes != "apart":
        part = np.flatnonzero(first if classes == "train" else ~first)
        return random_splits(data.subset(part), seed, labels=y[part])
    validation = first & (_rank_in_class(y) % _EVERY == _EVERY // 2)
    return {
        "train": data.subset(first & ~validation),
        "validation": data.subset(validation),
        "test": data.subset(~first),
    }


def _rank_in_class(y: np.ndarray) -> np.ndarray:
    """Position of each datum among those of its class, from 0."""
    rank = np.empty(len(y), int)
    for label in np.unique(y):
        rank[y == label] = np.arange((y == label).sum())
    return rank


def _middle_square(name: str, folder: Path, files: Sequence[str], images: Images, row: int) -> np.ndarray:
    """The middle square of one photograph, resized, 8-bit, `(3, height, width)`."""
    from PIL import Image

    path = folder / files[row]
    try:
        with Image.open(path) as image:
            pixels = np.asarray(image.convert("RGB")).transpose(2, 0, 1)
    except OSError as error:
        raise DataError(f"{name}: {path} is missing or damaged: copy it again, or delete it") from error
    side = min(pixels.shape[1:])
    top, left = ((length - side) // 2 for length in pixels.shape[1:])
    return resize_image(pixels[:, top : top + side, left : left + side], images.sides((side, side)))

"""Caltech-101."""

from __future__ import annotations

from pathlib import Path

from calibrant.data.dataset import Data
from calibrant.data.image_folders import class_splits, files_by_class, photographs
from calibrant.data.images import Images, Size
from calibrant.data.labelled_images import read_part
from calibrant.data.registry import register_data
from calibrant.errors import DataError
from calibrant.registries import Case

FOLDERS = ("caltech101/101_ObjectCategories", "caltech-101-small")
BACKGROUND = "BACKGROUND_Google"  # a folder of other pictures, no class


@register_data(
    "caltech-101",
    description="8,677 photographs of 101 kinds of things, colour, 128×128 (their middle square), labelled",
    source="Li, Andreeto, Ranzato & Perona 2004 (2022), CaltechDATA",
    licence="CC BY 4.0",
    folder="caltech101",
    or_folder="caltech-101-small",
    downloads=True,
    keys={"x": ((3, 128, 128), "float32"), "y": ((), "int64")},
    cases=(
        Case({"size": 32, "classes": "all"}, {"x": (3, 32, 32), "y": ()}),
        Case({"size": 32, "classes": "test"}, {"x": (3, 32, 32), "y": ()}),
    ),
)
def caltech_101(
    root: Path, download: bool, size: Size = 128, values: str = "unit", classes: str = "apart", seed: int = 0
) -> dict[str, Data]:
    """Caltech-101: `x` (3, 128, 128), `y` 0 to 100 in the order of the sorted names of the classes.

    With `classes="apart"`, training and validation images are of the classes 0 to 50 (every fifth image of a class is
    a validation image), and the test images are all of the classes 51 to 100: for retrieval among classes that were not
    seen in training. "all" splits every class 80/10/10, "train" and "test" only these classes. Images lie in
    caltech101/101_ObjectCategories/CLASS, as torchvision unpacks them, or in caltech-101-small/CLASS.
    """
    images = Images("caltech-101", size, values, seed)
    if download:
        from torchvision.datasets import Caltech101

        read_part("caltech-101", root / "caltech101", Caltech101, root, True)
    folder = next((root / folder for folder in FOLDERS if (root / folder).is_dir()), None)
    files = files_by_class(folder, without=[BACKGROUND]) if folder else []
    if folder is None or not files:
        raise DataError(
            f"caltech-101: {root / 'caltech101'} has no 101_ObjectCategories/CLASS/NAME.jpg: pass "
            "download=True (--download), unpack 101_ObjectCategories.tar.gz there, or give another root (root=, "
            "--data-root, CALIBRANT_DATA)"
        )
    names = [name for name, _ in files]
    data = photographs("caltech-101", folder, [file for _, file in files], names, images)
    return class_splits("caltech-101", data, names, classes, seed)

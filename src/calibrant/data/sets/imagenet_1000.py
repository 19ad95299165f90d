"""A sample of ImageNet, one image for each class, that the user provides."""

from __future__ import annotations

import re
from pathlib import Path

from calibrant.data.dataset import Data
from calibrant.data.image_folders import photographs
from calibrant.data.images import Images, Size
from calibrant.data.registry import register_data
from calibrant.data.splits import random_splits
from calibrant.errors import DataError
from calibrant.registries import Case

CLASSES = 1000
NAME = re.compile(r"(n\d{8})_(.+)\.jpe?g", re.IGNORECASE)


@register_data(
    "imagenet-1000",
    description="1,000 ImageNet images that you provide, one for each class, colour, 128×128 (their middle square)",
    source="Russakovsky et al. 2015, IJCV 115, 211–252",
    licence="ImageNet's terms: for non-commercial research and education",
    folder="imagenet-1000",
    keys={"x": ((3, 128, 128), "float32"), "y": ((), "int64")},
    cases=(Case({"size": 32}, {"x": (3, 32, 32), "y": ()}),),
)
def imagenet_1000(root: Path, download: bool, size: Size = 128, values: str = "unit", seed: int = 0) -> dict[str, Data]:
    """One image a class, imagenet-1000/nXXXXXXXX_name.JPEG: `x` (3, 128, 128), `y` 0 to 999; seeded 80/10/10 split.

    `y` is the place of the WordNet number nXXXXXXXX in sorted order, which is the order of the logits of networks that
    were trained on ImageNet. Every class is in one split alone. There is no download: ImageNet is had from its site
    on request. Whole ImageNet, with a folder for each class, is read by `load("FOLDER/")`.
    """
    folder = root / "imagenet-1000"
    found = sorted(path.name for path in folder.glob("n*") if NAME.fullmatch(path.name))
    names = [NAME.sub(r"\1 \2", file) for file in found]
    numbers = {name.partition(" ")[0] for name in names}
    if not len(found) == len(numbers) == CLASSES:
        raise DataError(
            f"imagenet-1000: {folder} holds {len(found)} images nXXXXXXXX_name.JPEG of {len(numbers)} classes, wanted "
            f"one for each of the {CLASSES} classes, and there is no automatic download: put them there, or give "
            "another root (root=, --data-root, CALIBRANT_DATA)"
        )
    return random_splits(
        photographs("imagenet-1000", folder, found, names, Images("imagenet-1000", size, values, seed)), seed
    )

"""Omniglot."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from calibrant.data.dataset import Data
from calibrant.data.images import Images, Size, resize_image
from calibrant.data.labelled_images import read_part
from calibrant.data.registry import register_data
from calibrant.data.splits import SPLITS, random_splits
from calibrant.errors import DataError
from calibrant.registries import Case

HELD_OUT = ("drawings", "alphabets")


@register_data(
    "omniglot",
    description="32,460 handwritten characters of 50 alphabets, grey, 28×28 (drawn at 105×105), labelled",
    source="Lake, Salakhutdinov & Tenenbaum 2015, Science 350, 1332–1338",
    licence="MIT",
    folder="omniglot",
    downloads=True,
    keys={"x": ((1, 28, 28), "float32"), "y": ((), "int64")},
    cases=(
        Case({"size": 14, "values": "binarised"}, {"x": (1, 14, 14), "y": ()}),
        Case({"held_out": "alphabets"}, {"x": (1, 28, 28), "y": ()}),
    ),
)
def omniglot(
    root: Path, download: bool, size: Size = 28, values: str = "unit", held_out: str = "drawings", seed: int = 0
) -> dict[str, Data]:
    """Omniglot: `x` (1, 28, 28) with bright strokes, `y` the character; seeded 80/10/10 split of each character.

    All drawings ALPHABET/characterNN/NAME.png below the folder are read, in whatever parts of the published data they
    lie (images_background and images_evaluation, or the smaller images_background_small1 and 2). They are mixed before
    the split, as usual for generative models (Burda, Grosse & Salakhutdinov 2016, arXiv 1509.00519): the test set has
    other drawings of the same characters. `size=None` keeps the 105×105 pixels of the drawings.

    With `held_out="alphabets"`, for retrieval among characters that were not seen in training, whole alphabets are
    held out, chosen at random by the seed: a quarter of them are the test set, an eighth the validation set (at least
    one each), and the coordinate `alphabet` names them.
    """
    if held_out not in HELD_OUT:
        raise DataError(f"omniglot: held_out={held_out!r} is given, wanted one of {', '.join(HELD_OUT)}")
    images, folder = Images("omniglot", size, values, seed), root / "omniglot"
    if download:
        _download(folder)
    drawings = _drawings(folder)
    if not drawings:
        raise DataError(
            f"omniglot: there is no ALPHABET/characterNN/NAME.png below {folder}: pass download=True (--download), "
            "unpack images_background.zip and images_evaluation.zip there, or give another root (root=, --data-root, "
            "CALIBRANT_DATA)"
        )
    x = np.stack([_drawing(path, images) for path in drawings.values()])
    characters = ["/".join(name[:2]) for name in drawings]
    y = np.unique(characters, return_inverse=True)[1]
    data = images.data(x, {"y": y})
    if held_out == "drawings":
        return random_splits(data, seed, labels=y)
    data.coords["alphabet"] = np.array([alphabet for alphabet, *_ in drawings])
    return _alphabets_apart(data, seed)


def _alphabets_apart(data: Data, seed: int) -> dict[str, Data]:
    """Splits of which no two hold drawings of one alphabet."""
    alphabets = np.random.default_rng(seed).permutation(np.unique(data.coords["alphabet"]))
    if len(alphabets) < len(SPLITS):
        raise DataError(
            f"omniglot: held_out='alphabets' needs {len(SPLITS)} alphabets or more, and there are {len(alphabets)}: "
            "unpack more of the set"
        )
    test = max(1, len(alphabets) // 4)
    validation = max(1, len(alphabets) // 8)
    parts = zip(SPLITS[::-1], np.split(alphabets, [test, test + validation]), strict=True)
    found = {split: data.subset(np.isin(data.coords["alphabet"], members)) for split, members in parts}
    return {split: found[split] for split in SPLITS}


def _download(folder: Path) -> None:
    from torchvision.datasets import Omniglot

    for background in (True, False):
        read_part("omniglot", folder, Omniglot, folder, True, background=background)


def _drawings(folder: Path) -> dict[tuple[str, ...], Path]:
    """(alphabet, character, file) → path, sorted; a drawing that stands in several parts is taken once."""
    paths = {path.parts[-3:]: path for path in sorted(folder.rglob("character*/*.png"))}
    return dict(sorted(paths.items()))


def _drawing(path: Path, images: Images) -> np.ndarray:
    """A drawing with white strokes on black, 8-bit, `(1, height, width)`."""
    from PIL import Image

    try:
        with Image.open(path) as image:
            ink = 255 - np.asarray(image.convert("L"))[None]
    except OSError as error:
        raise DataError(f"omniglot: {path} cannot be read: unpack it again") from error
    return resize_image(ink, images.sides(ink.shape[1:]))

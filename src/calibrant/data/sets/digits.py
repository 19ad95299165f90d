"""scikit-learn's handwritten digits."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from calibrant.data.dataset import Data
from calibrant.data.images import Images, Size
from calibrant.data.registry import register_data
from calibrant.data.splits import random_splits
from calibrant.errors import DataError
from calibrant.registries import Case


@register_data(
    "digits",
    description="1,797 handwritten digits, 8×8, grey, labelled; embedded (no download)",
    source="scikit-learn; Alpaydin & Kaynak 1998, UCI Optical Recognition of Handwritten Digits",
    licence="CC BY 4.0",
    keys={"x": ((1, 8, 8), "float32"), "y": ((), "int64")},
    cases=(
        Case({"levels": 256}, {"x": (1, 8, 8), "y": ()}),
        Case({"levels": 256, "size": 12, "values": "dequantised"}, {"x": (1, 12, 12), "y": ()}),
    ),
)
def digits(
    root: Path, download: bool, levels: int = 17, size: Size = None, values: str = "unit", seed: int = 0
) -> dict[str, Data]:
    """scikit-learn's digits: `x` (1, 8, 8) in [0, 1], `y` 0 to 9; seeded 80/10/10 split, stratified by digit.

    The digits are published with the grey values 0 to 16, which become k/16. `levels=256` rounds them to 8 bits, as
    other image sets have them, so that they can be resized and get other values.
    """
    from sklearn.datasets import load_digits

    bunch = load_digits()
    grey, labels = bunch.images[:, None] / 16, bunch.target
    images = Images("digits", size, values, seed)
    if levels == 256:
        data = images.data(np.rint(255 * grey).astype(np.uint8), {"y": labels})
    elif levels == 17 and size is None and values == "unit":
        data = Data({"x": grey.astype(np.float32), "y": labels}, name="digits")
    else:
        raise DataError(
            f"digits: levels={levels} does not go with size={size!r} and values={values!r}: give levels=256, the only "
            "one beside 17 that there is"
        )
    return random_splits(data, seed, labels=labels)

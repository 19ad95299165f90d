"""scikit-learn's handwritten digits."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from calibrant.data.dataset import Data
from calibrant.data.registry import register_data
from calibrant.data.splits import random_splits


@register_data(
    "digits",
    description="1,797 handwritten digits, 8×8, grey, labelled; embedded (no download)",
    source="scikit-learn; Alpaydin & Kaynak 1998, UCI Optical Recognition of Handwritten Digits",
    licence="CC BY 4.0",
    keys={"x": ((1, 8, 8), "float32"), "y": ((), "int64")},
)
def digits(root: Path, download: bool, seed: int = 0) -> dict[str, Data]:
    """scikit-learn's digits: `x` (1, 8, 8) in [0, 1], `y` 0 to 9; seeded 80/10/10 split, stratified by digit."""
    from sklearn.datasets import load_digits

    bunch = load_digits()
    x = (bunch.images[:, None] / 16).astype(np.float32)
    return random_splits(Data({"x": x, "y": bunch.target}, name="digits"), seed, labels=bunch.target)

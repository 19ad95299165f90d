"""Splits of a data set into training, validation and test data."""

from typing import Any

import numpy as np

from calibrant.data.dataset import Data
from calibrant.errors import DataError
from calibrant.shown import card, table

SPLITS = ("train", "validation", "test")
SMALLEST = 10  # with fewer data, one of the three parts of an 80/10/10 split would be empty


class Splits(dict[str, Data]):
    """The splits of a data set by name: a dict of `Data` with a short `repr`."""

    def __repr__(self) -> str:
        return "\n  ".join(["Splits:", *(f"{name}: {data!r}" for name, data in self.items())])

    def _repr_html_(self) -> str:
        heads = list(dict.fromkeys(head for data in self.values() for head in data.facts()))
        rows = [(name, *(data.facts().get(head, "") for head in heads)) for name, data in self.items()]
        return card("<b>Splits</b>", table(rows, ("split", *(head or "data" for head in heads))))


def interleaved(size: int) -> dict[str, np.ndarray]:
    """Split the positions 0 … size − 1 80/10/10: of every ten, the first goes to validation, the sixth to test.

    Positions sorted by a stratum (a label, an image) give every split its share of each stratum.
    """
    rank = np.arange(size) % 10
    validation, test = rank == 0, rank == 5
    return {
        "train": np.flatnonzero(~validation & ~test),
        "validation": np.flatnonzero(validation),
        "test": np.flatnonzero(test),
    }


def random_splits(data: Data, seed: int, labels: Any = None) -> dict[str, Data]:
    """Split data 80/10/10 at random, stratified if labels (one per datum) are given; the order of the data is kept.

    Raises:
        DataError: with fewer than 10 data.
    """
    if len(data) < SMALLEST:
        raise DataError(
            f"a random split into 80% training, 10% validation and 10% test data takes {SMALLEST} data or more, and "
            f"there {'is 1' if len(data) == 1 else f'are {len(data)}'}: return the splits train, validation and test, "
            "which may hold the same data, from a function of yours (FILE.py:function)"
        )
    order = np.random.default_rng(seed).permutation(len(data))
    if labels is not None:
        order = order[np.argsort(np.asarray(labels)[order], kind="stable")]
    return {split: data.subset(np.sort(order[where])) for split, where in interleaved(len(data)).items()}

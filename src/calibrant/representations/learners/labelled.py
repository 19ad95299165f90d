"""Labelled data as methods read them: inputs, and classes that are counted from 0."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from calibrant.data.dataset import Data
from calibrant.errors import DataError
from calibrant.streams import stream

ENTRIES = 2**22  # entries of the inputs that are read, or passed through a network, at a time
_SHARE, _LEAST = 0.1, 20  # share of the data that is held out, and the least number of data to split


class Labelled:
    """Data with inputs `x` `(n, *shape)` and whole-number labels `y` `(n,)`, each an observation or a covariate.

    Args:
        data: the data; other keys are passed on.
        classes: the labels, sorted, if they are known; None for those that occur.

    Attributes:
        classes: the labels; classes are counted in this order.
        shape: event shape of the inputs.

    Raises:
        DataError: for data without `x` or `y`, labels that are no whole numbers, or fewer than two classes.
    """

    def __init__(self, data: Data, classes: np.ndarray | None = None) -> None:
        known = data.keys()
        if missing := [key for key in ("x", "y") if key not in known]:
            raise DataError(
                f"the data have no {' and no '.join(missing)}: a method needs inputs x and labels y; rename keys with "
                'Data.select({"x": NAME, "y": NAME})'
            )
        self.data = data.split_keys({"y"}, set(known) - {"y"})  # as a covariate, x keeps its dtype
        self.shape = tuple(data.values("x", [0]).shape[1:])
        self.classes = self._labels() if classes is None else classes

    def _labels(self) -> np.ndarray:
        labels = self.data.values("y").cpu().numpy()
        if labels.ndim != 1:
            raise DataError(f"y has shape {labels.shape}: give one whole number per image, the label of its class")
        if len(fractions := labels[labels != np.round(labels)]):
            raise DataError(
                f"y has the label {fractions[0]:g}: give one whole number per image, the label of its class"
            )
        found = np.unique(labels.astype(np.int64))
        if len(found) < 2:
            raise DataError(f"all data have the label {found[0]}: a method needs two classes or more")
        return found

    def __len__(self) -> int:
        return len(self.data)

    def batch(self, index: Tensor) -> dict[str, Tensor]:
        """Some of the data: `x` as real numbers, `y` as classes `(rows,)`, and all other keys."""
        observed, covariates = self.data.batch(index)
        values = {**observed, **covariates}
        return {**values, "x": floating(values["x"]), "y": self._counted(values["y"])}

    def _counted(self, labels: Tensor) -> Tensor:
        return torch.from_numpy(np.searchsorted(self.classes, labels.cpu().numpy().astype(np.int64)))

    def as_classes(self) -> Data:
        """Observed classes `y`, counted from 0, with the covariate `x`, which is read batch by batch."""

        def look_up(batch: dict[str, Tensor]) -> dict[str, Tensor]:
            return {**batch, "x": self.data.values("x", batch["x"])}

        labels = self._counted(self.data.values("y"))
        return Data({"y": labels}, {"x": np.arange(len(self))}, {"data": self.data.labels()}, look_up)

    def blocks(self) -> Iterator[Tensor]:
        """Positions of all data, in blocks whose inputs have a bounded number of entries."""
        return iter(torch.arange(len(self.data)).split(rows_at_once(self.shape)))

    def split(self, seed: int) -> tuple[Labelled, Labelled]:
        """Training data and held-out data, a tenth; the same ones where there are fewer than 20 data.

        Views of one image, which have one label in the coordinate `image`, are on the same side.
        """
        images, of = np.unique(self.data.coords.get("image", np.arange(len(self))), return_inverse=True)
        if len(images) < _LEAST:
            return self, self
        generator = torch.Generator().manual_seed(stream(seed, "held out"))
        shuffled = torch.randperm(len(images), generator=generator)
        is_held = np.isin(of, shuffled[: round(_SHARE * len(images))].numpy())
        held = np.flatnonzero(is_held)  # in random order: losses of pairs compare neighbours
        held = held[torch.randperm(len(held), generator=generator).numpy()]
        kept, left = (Labelled(self.data.subset(part), self.classes) for part in (np.flatnonzero(~is_held), held))
        return kept, left


def rows_at_once(shape: tuple[int, ...]) -> int:
    """Number of inputs of an event shape that are taken at a time."""
    return max(1, ENTRIES // max(1, int(np.prod(shape))))


def floating(x: Tensor) -> Tensor:
    """Inputs in the default floating dtype; whole numbers are images from 0 to 255, which are divided by 255."""
    return x.to(torch.get_default_dtype()) / (1 if x.is_floating_point() else 255)

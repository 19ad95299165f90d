"""Pairs and tuples of images, from labelled images: data for the models of representations.

Tuples hold positions of images, which are looked up batch by batch, so that no image is copied.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from calibrant.data.arrays import Array
from calibrant.data.dataset import Batch, Data, as_data
from calibrant.errors import DataError
from calibrant.representations.kinds import is_whole
from calibrant.streams import stream

Whole = npt.NDArray[np.int64]
Images = Data | Mapping[str, Array]
BALANCES = ("images", "classes")
PLACES = ("first", "random")


def pairs(
    data: Images,
    count: int,
    seed: int = 0,
    matching: float | None = 0.5,
    *,
    balance: str = "images",
    label_probabilities: npt.ArrayLike | Tensor | None = None,
    image: str = "x",
    label: str = "y",
) -> Data:
    """Pairs of different images, and whether they match, for the models `pair` and `hib`.

    Two images match if they have the same class. With `label_probabilities`, they match if two labels agree that are
    drawn from their distributions.

    Args:
        data: labelled images or features, or a dict of them. They are not copied, and have to stay as they are.
        count: number of pairs.
        seed: random seed for the draws of pairs.
        matching: share of pairs that match. With 0.5, a pair matches with equal odds, as the constant of `pair`
            assumes; None for pairs of images at random, which match as often as chance has it.
        balance: "images" to draw the first image of a pair from all images, and the second one from all that match it
            or do not; "classes" to draw a class first each time, so that classes count equally.
        label_probabilities: probabilities of the classes of each image, `(len(data), classes)`, such as those of
            human labels, in place of `label`.
        image: name of the images in `data`.
        label: name of the classes in `data`, whole numbers.

    Returns:
        Covariates `x` and `other` `(count, *shape)`, observed `y` `(count,)`, 1 for a match; coordinates `first` and
        `second`: labels of both images in `data`.

    Raises:
        DataError: for classes of a single image, fewer than two classes, and arguments out of range.
    """
    data = _checked(data, count, balance, image)
    if matching is not None and not 0 <= matching <= 1:
        raise DataError(f"matching={matching!r}: give a share of pairs between 0 and 1, or None for random pairs")
    rng = np.random.default_rng(stream(seed, "pairs"))
    labels = _labels(data, label, label_probabilities)
    if matching is None:
        first, second = _two_of(len(data), count, rng)
        matches = labels.agree(first, second, rng)
    else:
        matches = rng.permutation(np.arange(count) < round(matching * count))
        labels.check(bool(matches.any()), not matches.all())
        first, classes = labels.first(count, balance, rng)
        second = np.empty_like(first)
        second[matches] = labels.matching(first[matches], classes[matches], rng)
        second[~matches] = labels.other(first[~matches], classes[~matches], balance, rng)
    names = {"first": data.labels()[first], "second": data.labels()[second]}
    rows = {"x": first, "other": second}
    return Data(
        {"y": matches.astype(np.float32)}, rows, names, _Lookup(data, image, tuple(rows)), f"pairs of {data.name}"
    )


def candidates(
    data: Images,
    count: int,
    candidates: int = 16,
    seed: int = 0,
    *,
    place: str = "first",
    balance: str = "images",
    label_probabilities: npt.ArrayLike | Tensor | None = None,
    image: str = "x",
    label: str = "y",
) -> Data:
    """References with candidates of which one matches, for the models `mcinfonce` and `infonce`.

    Args:
        data: labelled images or features, or a dict of them. They are not copied, and have to stay as they are.
        count: number of tuples.
        candidates: K, number of candidates; all but one are of other classes than the reference, and may repeat.
        seed: random seed for the draws of tuples.
        place: place of the candidate that matches: "first" (y = 1 for every tuple), or "random" (y is the one-hot
            vector of the place, for `form="categorical"`).
        balance: "images" or "classes", as for `pairs`.
        label_probabilities: probabilities of the classes of each image, as for `pairs`.
        image: name of the images in `data`.
        label: name of the classes in `data`, whole numbers.

    Returns:
        Covariates `x` `(count, *shape)` and `candidates` `(count, K, *shape)`, observed `y` `(count,)` or `(count, K)`;
        coordinates `first` and `second`: labels in `data` of the reference and of the image that matches.

    Raises:
        DataError: for classes of a single image, fewer than two classes, and arguments out of range.
    """
    data = _checked(data, count, balance, image)
    if not is_whole(candidates) or candidates < 2:
        raise DataError(f"candidates={candidates!r}: give 2 or more, one that matches and one that does not")
    if place not in PLACES:
        raise DataError(f"place={place!r} is unknown; known: {list(PLACES)}")
    rng = np.random.default_rng(stream(seed, "candidates"))
    labels = _labels(data, label, label_probabilities)
    labels.check(True, True)
    first, classes = labels.first(count, balance, rng)
    rows = np.empty((count, candidates), np.int64)
    rows[:, 0] = second = labels.matching(first, classes, rng)
    for column in range(1, candidates):
        rows[:, column] = labels.other(first, classes, balance, rng)
    y = np.ones(count, np.float32)
    if place == "random":
        places = rng.integers(candidates, size=count)
        every = np.arange(count)
        rows[every, 0], rows[every, places] = rows[every, places], rows[every, 0]
        y = np.eye(candidates, dtype=np.float32)[places]
    names = {"first": data.labels()[first], "second": data.labels()[second]}
    lookup = _Lookup(data, image, ("x", "candidates"))
    return Data({"y": y}, {"x": first, "candidates": rows}, names, lookup, f"candidates of {data.name}")


def batches(data: Images, count: int, size: int = 32, seed: int = 0, *, image: str = "x", label: str = "y") -> Data:
    """Batches of images of different classes with a match for each, for `models.SharedNegatives`; a datum is a batch.

    Args:
        data: labelled images or features, or a dict of them. They are not copied, and have to stay as they are.
        count: number of batches.
        size: B, number of images of a batch, each of another class.
        seed: random seed for the draws.
        image: name of the images in `data`.
        label: name of the classes in `data`, whole numbers.

    Returns:
        Covariates `x` and `other` `(count, B, *shape)`, observed `y` `(count,)`, always 1.

    Raises:
        DataError: for classes of a single image, and for fewer classes than images in a batch.
    """
    data = _checked(data, count, "classes", image)
    labels = _hard(data, label)
    labels.check(True, True)
    known = len(labels.names)
    if not is_whole(size) or not 2 <= size <= known:
        raise DataError(f"size={size!r}: the images of a batch are of different classes, so give 2 to {known}")
    rng = np.random.default_rng(stream(seed, "batches"))
    classes = np.stack([rng.permutation(known)[:size] for _ in range(count)]).reshape(-1)
    first = labels.of_classes(classes, rng)
    rows = {"x": first.reshape(count, size), "other": labels.matching(first, classes, rng).reshape(count, size)}
    lookup = _Lookup(data, image, tuple(rows))
    return Data({"y": np.ones(count, np.float32)}, rows, None, lookup, f"batches of {data.name}")


@dataclass(frozen=True)
class _Lookup:
    """Replaces positions of images by the images themselves, each of which is read once per batch."""

    images: Data
    name: str
    keys: tuple[str, ...]

    def __call__(self, batch: Batch) -> Batch:
        rows = torch.cat([batch[key].reshape(-1) for key in self.keys])
        read, place = rows.unique(return_inverse=True)
        found = self.images.values(self.name, read, rows.device)
        parts = found[place].split([batch[key].numel() for key in self.keys])
        looked_up = {
            key: part.reshape(*batch[key].shape, *found.shape[1:]) for key, part in zip(self.keys, parts, strict=True)
        }
        return {**batch, **looked_up}

    def fingerprint(self) -> str:
        """The fingerprint of the images, for that of the tuples."""
        return self.images.fingerprint()


class _Labels(Protocol):
    """What is known of the classes of images; images are positions, and arrays have one entry per tuple."""

    def check(self, matching: bool, other: bool) -> None: ...

    def first(self, count: int, balance: str, rng: np.random.Generator) -> tuple[Whole, Whole]: ...

    def matching(self, first: Whole, classes: Whole, rng: np.random.Generator) -> Whole: ...

    def other(self, first: Whole, classes: Whole, balance: str, rng: np.random.Generator) -> Whole: ...

    def agree(self, first: Whole, second: Whole, rng: np.random.Generator) -> npt.NDArray[np.bool_]: ...


class _Hard:
    """One class for each image."""

    def __init__(self, labels: npt.NDArray[Any], name: str) -> None:
        self.name = name
        self.names, self.of_image, self.counts = np.unique(labels, return_inverse=True, return_counts=True)
        self.by_class = np.argsort(self.of_image, kind="stable")  # positions of images, class after class
        self.starts = self.counts.cumsum() - self.counts
        self.rank = np.empty_like(self.by_class)  # place of every image in its class
        self.rank[self.by_class] = np.arange(len(labels)) - self.starts.repeat(self.counts)

    def check(self, matching: bool, other: bool) -> None:
        """Refuse classes that have no second image, or images of a single class."""
        single = self.names[self.counts == 1].tolist()
        if matching and single:
            shown = f"{single[:20]}" + (f" and {len(single) - 20} more" if len(single) > 20 else "")
            raise DataError(
                f"classes {shown} of {self.name!r} have one image each, which no other image matches: leave classes of "
                f"one image out with representations.matchable(data, label={self.name!r})"
            )
        if other and len(self.names) < 2:
            raise DataError(f"all images have the class {self.names[0]} in {self.name!r}: give two classes or more")

    def first(self, count: int, balance: str, rng: np.random.Generator) -> tuple[Whole, Whole]:
        """First images of tuples, and their classes."""
        if balance == "images":
            images = rng.integers(len(self.of_image), size=count)
            return images, self.of_image[images]
        classes = rng.integers(len(self.names), size=count)
        return self.of_classes(classes, rng), classes

    def matching(self, first: Whole, classes: Whole, rng: np.random.Generator) -> Whole:
        """Other images of the same classes."""
        drawn = rng.integers(self.counts[classes] - 1)
        return self._of(classes, drawn + (drawn >= self.rank[first]))

    def other(self, first: Whole, classes: Whole, balance: str, rng: np.random.Generator) -> Whole:
        """Images of other classes."""
        if balance == "classes":
            others = rng.integers(len(self.names) - 1, size=len(first))
            others += others >= classes
            return self.of_classes(others, rng)
        drawn = rng.integers(len(self.of_image) - self.counts[classes])
        return self.by_class[drawn + self.counts[classes] * (drawn >= self.starts[classes])]

    def of_classes(self, classes: Whole, rng: np.random.Generator) -> Whole:
        """An image of each of these classes."""
        return self._of(classes, rng.integers(self.counts[classes]))

    def agree(self, first: Whole, second: Whole, rng: np.random.Generator) -> npt.NDArray[np.bool_]:
        """Whether two images have the same class."""
        return self.of_image[first] == self.of_image[second]

    def _of(self, classes: Whole, places: Whole) -> Whole:
        return self.by_class[self.starts[classes] + places]


class _Soft:
    """Probabilities of classes for each image, from which a label is drawn for every tuple."""

    def __init__(self, probabilities: npt.NDArray[np.float64]) -> None:
        self.probabilities = probabilities
        self.rows = probabilities.cumsum(1)
        self.columns = probabilities.cumsum(0)  # along the images, class by class

    def check(self, matching: bool, other: bool) -> None:
        """Refuse images that match no other image, and classes that all images have."""
        shared = (self.probabilities > 0).sum(0)
        alone = np.flatnonzero(((self.probabilities > 0) & (shared == 1)).any(1))
        if matching and len(alone):
            raise DataError(
                f"image {alone[0]} has a class in label_probabilities that no other image has, so that nothing matches "
                f"it: leave out {len(alone)} such images, or the class"
            )
        if other and (self.probabilities.min(0) == 1).any():
            raise DataError("all images have the same class, in label_probabilities: give two classes or more")

    def first(self, count: int, balance: str, rng: np.random.Generator) -> tuple[Whole, Whole]:
        """First images of tuples, and labels that are drawn for them."""
        if balance == "images":
            images = rng.integers(len(self.rows), size=count)
            uniform = rng.random(count)[:, None] * self.rows[images, -1:]
            return images, (uniform >= self.rows[images]).sum(1).clip(max=self.rows.shape[1] - 1)
        known = np.flatnonzero(self.columns[-1] > 0)
        classes = known[rng.integers(len(known), size=count)]
        return self._by_weight(classes, self.columns, rng), classes

    def matching(self, first: Whole, classes: Whole, rng: np.random.Generator) -> Whole:
        """Other images, each with the probability of the same label."""
        return self._not_first(first, classes, self.columns, rng)

    def other(self, first: Whole, classes: Whole, balance: str, rng: np.random.Generator) -> Whole:
        """Other images, each with the probability of another label; by "classes", a label is drawn first."""
        if balance == "images":
            rest = np.arange(1, len(self.rows) + 1)[:, None] - self.columns
            return self._not_first(first, classes, rest, rng)
        known = np.flatnonzero(self.columns[-1] > 0)
        place = np.searchsorted(known, classes)
        others = rng.integers(len(known) - 1, size=len(first))
        return self._not_first(first, known[others + (others >= place)], self.columns, rng)

    def agree(self, first: Whole, second: Whole, rng: np.random.Generator) -> npt.NDArray[np.bool_]:
        """Whether two labels that are drawn agree."""
        return rng.random(len(first)) < (self.probabilities[first] * self.probabilities[second]).sum(1)

    def _not_first(
        self, first: Whole, classes: Whole, cumulative: npt.NDArray[np.float64], rng: np.random.Generator
    ) -> Whole:
        """Images by their weights for the classes, drawn again where an image would be paired with itself."""
        found = self._by_weight(classes, cumulative, rng)
        while len(same := np.flatnonzero(found == first)):
            found[same] = self._by_weight(classes[same], cumulative, rng)
        return found

    def _by_weight(self, classes: Whole, cumulative: npt.NDArray[np.float64], rng: np.random.Generator) -> Whole:
        found = np.empty(len(classes), np.int64)
        for one in np.unique(classes):
            at = np.flatnonzero(classes == one)
            weights = cumulative[:, one]
            found[at] = np.searchsorted(weights, rng.random(len(at)) * weights[-1], side="right")
        return found.clip(max=len(cumulative) - 1)


def matchable(data: Images, label: str = "y") -> Data:
    """The data without the classes of a single image, which no other image matches.

    Args:
        data: labelled images.
        label: name of the classes.

    Raises:
        DataError: if no class has two images.
    """
    data = as_data(data)
    _, of_image, counts = np.unique(data.values(label).cpu().numpy(), return_inverse=True, return_counts=True)
    if not (counts > 1).any():
        raise DataError(f"no class in {label!r} has two images, so that none match: give several images of a class")
    return data.subset(counts[of_image] > 1)


def _labels(data: Data, label: str, probabilities: npt.ArrayLike | Tensor | None) -> _Labels:
    """The classes of images, hard or soft."""
    if probabilities is None:
        return _hard(data, label)
    table = np.asarray(probabilities.cpu() if isinstance(probabilities, Tensor) else probabilities, dtype=np.float64)
    if table.ndim != 2 or len(table) != len(data):
        raise DataError(f"label_probabilities have shape {table.shape}: wanted ({len(data)}, classes)")
    if not (table >= 0).all() or not np.allclose(table.sum(1), 1, atol=1e-4):
        raise DataError("label_probabilities: every row has to sum to 1; divide counts by their sum")
    return _Soft(table / table.sum(1, keepdims=True))


def _hard(data: Data, label: str) -> _Hard:
    values = data.values(label).cpu().numpy()
    if values.ndim != 1:
        raise DataError(f"{label!r} has shape {values.shape}: give one class per image, shape ({len(data)},)")
    return _Hard(values, label)


def _two_of(size: int, count: int, rng: np.random.Generator) -> tuple[Whole, Whole]:
    """Two different images of so many, at random."""
    if size < 2:
        raise DataError("pairs need two images or more")
    first, second = rng.integers(size, size=count), rng.integers(size - 1, size=count)
    return first, second + (second >= first)


def _checked(data: Images, count: int, balance: str, image: str) -> Data:
    found = as_data(data)
    names = found.keys()
    if image not in names:
        raise DataError(f"the data have no images {image!r}, only {', '.join(names)}: name them with image=")
    if not is_whole(count) or count < 1:
        raise DataError(f"count={count!r}: give a number of tuples above 0, a whole number")
    if balance not in BALANCES:
        raise DataError(f"balance={balance!r} is unknown; known: {list(BALANCES)}")
    return found

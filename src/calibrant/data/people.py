"""What people say about images of registered data sets: how many chose which class."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from calibrant.data.files import read_arrays
from calibrant.data.registry import data_root
from calibrant.errors import DataError

IMAGES, CLASSES = 10_000, 10
CORRECTIONS = ("none", "miller-madow")


@dataclass(frozen=True)
class HumanLabels:
    """How many people chose which class, for every image of one split of a data set, in its published order.

    Attributes:
        name: name of the publication.
        counts: number of judgements, int64 `(images, classes)`.
        source: publication.
        licence: licence of the labels.
    """

    name: str
    counts: np.ndarray
    source: str
    licence: str

    @property
    def judgements(self) -> np.ndarray:
        """Number of judgements of every image, `(images,)`."""
        return np.asarray(self.counts.sum(1))

    @property
    def probabilities(self) -> np.ndarray:
        """Share of the judgements for each class, `(images, classes)`."""
        return np.asarray(self.counts / self.counts.sum(1, keepdims=True))

    @property
    def majority(self) -> np.ndarray:
        """The class that most people chose, the first of several, `(images,)`."""
        return np.asarray(self.counts.argmax(1))

    def entropy(self, correction: str = "none") -> np.ndarray:
        """Entropy of the judgements of every image, in nats, `(images,)`.

        Args:
            correction: "none" for the entropy of the shares, which is too small on average: with n judgements and K
                classes of positive probability by about (K − 1) / (2n), some .02 nats for 50 judgements and 3 classes.
                "miller-madow" adds that number with the classes that were chosen in place of K (Miller 1955), which
                removes most of the bias and can exceed the logarithm of the number of classes.

        Raises:
            DataError: for another correction.
        """
        if correction not in CORRECTIONS:
            raise DataError(f"correction={correction!r} is given, wanted one of {', '.join(CORRECTIONS)}")
        shares = self.probabilities
        found = -np.where(shares > 0, shares * np.log(np.where(shares > 0, shares, 1.0)), 0.0).sum(1)
        if correction == "none":
            return np.asarray(found)
        return np.asarray(found + ((self.counts > 0).sum(1) - 1) / (2 * self.judgements))


@dataclass(frozen=True)
class HumanLabelSet:
    """The description of published human labels of a data set.

    Attributes:
        data: name of the data set.
        split: the published part that is labelled, "test" or "train".
        name: name of the publication.
        description: what they are, in one line.
        source: publication.
        licence: licence.
        file: path below the data root.
        origin: where the file is published.
        read: function from the path to the counts.
    """

    data: str
    split: str
    name: str
    description: str
    source: str
    licence: str
    file: str
    origin: str
    read: Callable[[Path], np.ndarray]

    def state(self, root: str | Path | None = None) -> str:
        """`ready` or `absent` (to be put into the folder by hand)."""
        return "ready" if (data_root(root) / self.file).is_file() else "absent"


def human_labels(data: str, split: str = "test", root: str | Path | None = None) -> HumanLabels:
    """What people say about the images of a registered data set.

    Row n belongs to the datum that `labels()` calls n: of `test = load("fashion-mnist")["test"]`, the entropies are
    `human_labels("fashion-mnist").entropy()[test.labels()]`. Of a training set, the labels 0, 1, … are those of the
    splits train and validation.

    Args:
        data: name of the data set, such as "cifar10" or "fashion-mnist".
        split: the published part that is labelled: "test", or "train" where there is one.
        root: folder of the data files, see `data_root`.

    Raises:
        DataError: for a data set without human labels, or for files that are missing or damaged.
    """
    card = next((card for card in _CARDS if (card.data, card.split) == (data, split)), None)
    if card is None:
        known = ", ".join(f"human_labels({card.data!r}, {card.split!r})" for card in _CARDS)
        raise DataError(f"there are no human labels of {data!r}, split={split!r}; there are {known}")
    path = data_root(root) / card.file
    if not path.is_file():
        raise DataError(
            f"{card.name}: there is no file {path}, and no automatic download: get it from {card.origin}, or give "
            "another root (root=, --data-root, CALIBRANT_DATA)"
        )
    return HumanLabels(card.name, _checked(card, path, card.read(path)), card.source, card.licence)


def list_human_labels() -> list[HumanLabelSet]:
    """The published human labels of data sets; `.state(root)` tells which are ready."""
    return list(_CARDS)


def _checked(card: HumanLabelSet, path: Path, counts: np.ndarray) -> np.ndarray:
    """Counts as whole numbers, of the right shape, with a judgement for every image."""
    images = IMAGES if card.split == "test" else 5 * IMAGES
    whole = counts.dtype.kind in "iuf" and bool((counts == np.round(counts)).all())
    if counts.shape != (images, CLASSES) or not whole or bool((counts < 0).any() or (counts.sum(1) == 0).any()):
        raise DataError(
            f"{card.name}: {path} does not hold numbers of judgements of {images} images and {CLASSES} classes: copy "
            f"it again from {card.origin}"
        )
    return counts.astype(np.int64)


def _array(path: Path) -> np.ndarray:
    return np.asarray(read_arrays(path)["x"])


def _table(path: Path) -> np.ndarray:
    """The counts of a text file with a row of numbers, separated by commas, for each image."""
    try:
        return np.loadtxt(path, delimiter=",", ndmin=2)
    except ValueError:  # words, or rows of different lengths
        return np.empty(0)


def _noisy(path: Path) -> np.ndarray:
    """Counts of the three labels of every image."""
    arrays = read_arrays(path)
    labels = [arrays.get(f"random_label{k}", np.empty(0)) for k in (1, 2, 3)]
    if any(label.shape != labels[0].shape or label.ndim != 1 for label in labels):
        return np.empty(0)
    return np.asarray(sum((label[:, None] == np.arange(CLASSES)).astype(np.int64) for label in labels))


_CARDS = (
    HumanLabelSet(
        "cifar10",
        "test",
        "CIFAR-10H",
        "47 to 63 judgements of each of the 10,000 test images of CIFAR-10",
        "Peterson, Battleday, Griffiths & Russakovsky 2019, ICCV, arXiv 1908.07086",
        "CC BY-NC-SA 4.0",
        "cifar-10h/cifar10h-counts.npy",
        "https://github.com/jcpeterson/cifar-10h (data/cifar10h-counts.npy)",
        _array,
    ),
    HumanLabelSet(
        "cifar10",
        "train",
        "CIFAR-10N",
        "three judgements of each of the 50,000 training images of CIFAR-10",
        "Wei, Zhu, Cheng, Liu, Niu & Liu 2022, ICLR, arXiv 2110.12088",
        "CC BY-NC 4.0",
        "cifar-10n/cifar10n_labels.npz",
        "https://github.com/UCSC-REAL/cifar-10-100n (the arrays of data/CIFAR-10_human.pt, saved by numpy.savez)",
        _noisy,
    ),
    HumanLabelSet(
        "fashion-mnist",
        "test",
        "Fashion-MNIST-H",
        "53 to 79 judgements of each of the 10,000 test images of Fashion-MNIST",
        "Ishida, Yamane, Charoenphakdee, Niu & Sugiyama 2023, ICLR, arXiv 2202.00395",
        "GPL-3.0 (of the repository)",
        "fashion-mnist-h/fmh_counts.csv",
        "https://github.com/takashiishida/irreducible (data/fmh_counts.csv)",
        _table,
    ),
)

"""Data sets of torch and torchvision as arrays, or as Datasets whose items are dicts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import (
    DataLoader,
    Dataset,
    IterableDataset,
    RandomSampler,
    SequentialSampler,
    Subset,
    SubsetRandomSampler,
    TensorDataset,
)
from torch.utils.data.dataloader import default_collate, default_convert

from calibrant.data.arrays import Array
from calibrant.errors import DataError

NAMES = ("x", "y")  # names of the parts of an item that is no dict: an observation, and its label
_COMPARED = 3  # items that are compared with the stored images of a set


@dataclass(frozen=True)
class Items:
    """A data set as a source of `Data`.

    Attributes:
        source: name → tensor or array, or a map-style Dataset of dicts.
        names: the names of the parts of an item that is no dict; () for items that are dicts.
        rows: place of every datum in the data set of which this is a part; None for all of it.
        note: what was done, a sentence; "" if there is nothing to say.
        first: the first item of a Dataset, by name.
    """

    source: Mapping[str, Array] | Dataset
    names: tuple[str, ...] = ()
    rows: np.ndarray | None = None
    note: str = ""
    first: Mapping[str, Any] = field(default_factory=dict)


def items_of(dataset: Dataset | DataLoader, names: Sequence[str] | None) -> Items:
    """A data set of torch, with names for what its items hold.

    Items are dicts, tensors, images of pillow, or tuples of these and of labels, as those of torchvision are. Tensors
    in memory are taken as they are, all others are read when they are needed.

    Args:
        dataset: a map-style Dataset, a part of one (`Subset`), or a DataLoader, whose data set is taken.
        names: names of the parts of an item; None for "x", and "y" for the label. Parts without a name are left out.

    Raises:
        DataError: for a Dataset without length, or whose items have no names; for a DataLoader that changes the items.
    """
    if isinstance(dataset, DataLoader):
        return _loaded(dataset, names)
    if isinstance(dataset, IterableDataset) or not hasattr(dataset, "__len__"):
        raise DataError(
            f"{type(dataset).__name__} has no length: give a map-style Dataset, with __len__ and __getitem__"
        )
    if len(dataset) == 0:
        raise DataError(f"the {type(dataset).__name__} is empty: at least one datum is needed")
    whole, rows = _whole(dataset)
    item = whole[0]
    if isinstance(item, Mapping):
        return _of_dicts(dataset, item, rows, names)
    parts = list(item) if isinstance(item, tuple | list) else [item]
    called = _called(type(whole).__name__, parts, names)
    note = ""
    if names is None and len(called) > 1:
        note = f"the second part of every item is {called[1]!r}, which programs without it ignore"
    stored = _stored(whole, called)
    if stored is None:
        return Items(named := Named(dataset, called), called, rows, note, named.of(item))
    return Items(stored if rows is None else {name: part[rows] for name, part in stored.items()}, called, rows, note)


def _of_dicts(dataset: Dataset, item: Mapping[str, Any], rows: np.ndarray | None, names: Sequence[str] | None) -> Items:
    if names is not None:
        raise DataError(f"names= is given for items that have names themselves, {', '.join(map(str, item))}: leave it")
    if not item:
        raise DataError("item 0 of the Dataset is an empty dict: return at least one observation, such as {'x': image}")
    return Items(dataset, (), rows, first=item)


def _whole(dataset: Any) -> tuple[Any, np.ndarray | None]:
    """The data set of which this is a part, and the places of its items in it.

    A class derived from `Subset` may change the items, so that only its own items are known.
    """
    rows = None
    while type(dataset) is Subset:
        indices = np.asarray(dataset.indices, dtype=np.int64)
        rows = indices if rows is None else indices[rows]
        dataset = dataset.dataset
    if rows is not None and len(np.unique(rows)) < len(rows):
        raise DataError("the Subset names an item twice, but results are joined on its place: give every index once")
    return dataset, rows


def _called(kind: str, parts: Sequence[Any], names: Sequence[str] | None) -> tuple[str, ...]:
    """The names of the parts of an item."""
    if not parts or (not isinstance(parts[0], Tensor | np.ndarray | int | float) and not is_picture(parts[0])):
        found = f"a {type(parts[0]).__name__}" if parts else "nothing"
        raise DataError(f"item 0 of the {kind} has {found} at its first place: return an array, or a dict of arrays")
    if names is None:
        if len(parts) > len(NAMES):
            raise DataError(
                f"item 0 of the {kind} has {len(parts)} parts: name them, calibrant.data.as_data(dataset, "
                f"names=[{', '.join(repr(chr(97 + i)) for i in range(len(parts)))}]), by the sites and covariates of "
                "the program"
            )
        return NAMES[: len(parts)]
    if isinstance(names, str) or not 0 < len(names) <= len(parts) or len(set(names)) < len(names):
        raise DataError(f"names={names!r} is given, item 0 of the {kind} has {len(parts)} parts: give a list of names")
    return tuple(names)


class Named(Dataset):
    """A Dataset whose items are dicts, from one whose items are tuples or single values.

    Images of pillow become 8-bit arrays `(channels, height, width)`.
    """

    def __init__(self, dataset: Any, names: tuple[str, ...]) -> None:
        self.dataset, self.names = dataset, names

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.of(self.dataset[index])

    def of(self, item: Any) -> dict[str, Any]:
        """An item as a dict.

        Raises:
            DataError: for an item with fewer parts than there are names.
        """
        parts = item if isinstance(item, tuple | list) else (item,)
        if len(parts) < len(self.names):
            raise DataError(f"an item of the Dataset has {len(parts)} parts, wanted {', '.join(self.names)}")
        return {name: _array(part) for name, part in zip(self.names, parts, strict=False)}


def is_picture(value: object) -> bool:
    """Whether a value is an image of pillow."""
    return type(value).__module__.startswith("PIL.")


def _array(part: Any) -> Any:
    if not is_picture(part):
        return part
    pixels = np.array(part)
    return pixels[None] if pixels.ndim == 2 else np.ascontiguousarray(pixels.transpose(2, 0, 1))


def _stored(dataset: Any, names: tuple[str, ...]) -> dict[str, Array] | None:
    """The tensors of a data set that is in memory; None where its items have to be asked for.

    The sets of torchvision keep 8-bit images in `data` and labels in `targets`. They are taken if the items are these.
    """
    if type(dataset) is TensorDataset:
        return dict(zip(names, dataset.tensors, strict=False))
    images, labels = getattr(dataset, "data", None), getattr(dataset, "targets", None)
    if not type(dataset).__module__.startswith("torchvision.") or not isinstance(images, Tensor | np.ndarray):
        return None
    if not _keeps_grey_values(getattr(dataset, "transform", None)) or getattr(dataset, "target_transform", None):
        return None
    images = torch.as_tensor(images)
    if images.dtype != torch.uint8 or len(images) != len(dataset) or labels is None or len(names) > len(NAMES):
        return None
    images = images[:, None] if images.dim() == 3 else images.permute(0, 3, 1, 2)
    stored: dict[str, Array] = dict(zip(names, (images.contiguous(), torch.as_tensor(labels)), strict=False))
    return stored if _is_same(Named(dataset, names), stored) else None


def _keeps_grey_values(transform: Any) -> bool:
    """Whether a transform does nothing, or nothing but to divide grey values by 255."""
    steps = transform.transforms if type(transform).__name__ == "Compose" else [transform]
    return all(step is None or type(step).__name__ == "ToTensor" for step in steps)


def _is_same(items: Named, stored: Mapping[str, Array]) -> bool:
    """Whether some items hold what is stored, as grey values k or k/255."""
    for row in {int(row) for row in np.linspace(0, len(items) - 1, _COMPARED)}:
        for name, part in items[row].items():
            value, kept = torch.as_tensor(part), torch.as_tensor(stored[name][row])
            wanted = kept.float() / 255 if value.is_floating_point() else kept
            if value.shape != wanted.shape or not torch.equal(value, wanted.to(value.dtype)):
                return False
    return True


def _loaded(loader: DataLoader, names: Sequence[str] | None) -> Items:
    """The data set behind a DataLoader."""
    sampler = loader.sampler
    dataset: Any = loader.dataset
    if isinstance(sampler, SubsetRandomSampler):
        dataset = Subset(dataset, sorted(int(index) for index in sampler.indices))
    elif not isinstance(sampler, SequentialSampler | RandomSampler) or getattr(sampler, "replacement", False):
        raise DataError(
            f"the DataLoader draws its data by a {type(sampler).__name__}: give its data set, loader.dataset, every "
            "datum of which counts once"
        )
    if loader.collate_fn not in (default_collate, default_convert):
        raise DataError("the DataLoader has a collate_fn, which changes the items: give a Dataset that returns them so")
    found = items_of(dataset, names)
    note = "the data set of the DataLoader is taken whole, without its batches and their order"
    return replace(found, note=f"{note}; {found.note}" if found.note else note)

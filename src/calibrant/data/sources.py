"""What data are given as: one place that makes arrays with names of everything that `Data` takes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from torch.utils.data import DataLoader, Dataset

from calibrant.data.arrays import Array, checked_array, first_nonfinite, listed, not_finite
from calibrant.data.grey_values import ROW, VALUES, WORDS, holds_images, is_binary
from calibrant.data.tables import Column, column_of, mapping_of
from calibrant.data.torch_sets import Items, items_of
from calibrant.errors import DataError


@dataclass(frozen=True)
class Source:
    """Data as they are stored, under the names that they came with.

    Attributes:
        stored: name → tensor or array, observations and covariates; or a Dataset whose items are dicts.
        observed: names of the observations.
        covariates: names of the covariates.
        size: number of data.
        labels: label of every datum; None where they have none.
        dims: name → names of its dimensions after that of the data, where it has any.
        event_coords: dimension → labels along it.
        optional: names that a program without them ignores: the labels of labelled images.
        images: names that hold 8-bit images.
        notes: what was done to the data, in sentences.
        has_rows: whether the key `ROW` is stored too.
    """

    stored: dict[str, Array] | Dataset
    observed: tuple[str, ...]
    covariates: tuple[str, ...]
    size: int
    labels: np.ndarray | None = None
    dims: dict[str, tuple[str, ...]] = field(default_factory=dict)
    event_coords: dict[str, np.ndarray] = field(default_factory=dict)
    optional: frozenset[str] = frozenset()
    images: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    has_rows: bool = False

    @property
    def keys(self) -> tuple[str, ...]:
        """All keys that are stored."""
        return (*self.observed, *self.covariates, *([ROW] if self.has_rows else []))


def source_of(observed: Any, covariates: Any, names: Sequence[str] | None = None) -> Source:
    """Observations and covariates in any form as arrays with names.

    Args:
        observed: a dict of tensors, arrays, lists, Series, DataFrames and DataArrays; a DataFrame or xarray Dataset,
            with a key for every column or variable; a Series or DataArray with a name; a torch Dataset or DataLoader.
        covariates: the same, except for a Dataset of torch and a DataLoader.
        names: names of the parts of an item of a Dataset, if items are no dicts.

    Raises:
        DataError: for everything else, for values that are no real and finite numbers, and for lengths or labels that
            differ; the message says what to do.
    """
    if isinstance(observed, Dataset | DataLoader):
        if covariates:
            raise DataError(
                "covariates were given beside a Dataset: return them in its items, under the names of forward"
            )
        return _of_items(items_of(observed, names))
    if names is not None:
        raise DataError(f"names= is for the items of a torch Dataset, not for a {type(observed).__name__}")
    parts: dict[str, Any] = {
        "observed": mapping_of(observed),
        "covariates": mapping_of({} if covariates is None else covariates),
    }
    for role, value in parts.items():
        if not isinstance(value, Mapping):
            raise DataError(
                f"{role} is a {type(value).__name__}: give a dict from names to arrays, such as {{'x': array}}"
            )
    return _of_columns(*parts.values())


def _of_items(items: Items) -> Source:
    """A Source of a Dataset of torch, or of the tensors behind it."""
    notes = (items.note,) if items.note else ()
    optional = frozenset(items.names[1:])
    if isinstance(items.source, Mapping):
        found = _of_columns(items.source, {})
        stored, names, size, images = found.stored, found.observed, found.size, found.images
    else:
        dataset: Any = items.source
        size = len(dataset)
        arrays = {name: np.asarray(value)[None] for name, value in items.first.items() if hasattr(value, "shape")}
        images = tuple(name for name, value in arrays.items() if holds_images(value))
        stored, names = dataset, tuple(items.first)
    return Source(stored, names, (), size, items.rows, {}, {}, optional, images, notes)


def _of_columns(observed: Mapping[str, Any], covariates: Mapping[str, Any]) -> Source:
    """A Source of columns, all with the same length and labels."""
    if not observed:
        raise DataError("observed is empty: give at least one observed site, such as {'x': array}")
    if twice := sorted(set(map(str, observed)) & set(map(str, covariates))):
        raise DataError(
            f"{', '.join(map(repr, twice))}: given both as an observation and as a covariate: leave one out"
        )
    columns = {name: column_of(name, value) for name, value in {**observed, **covariates}.items()}
    arrays = {name: checked_array(name, column.values) for name, column in columns.items()}
    labels = _labels(columns)
    return Source(
        arrays,
        tuple(observed),
        tuple(covariates),
        _size(arrays),
        labels,
        {name: column.dims for name, column in columns.items() if column.dims},
        _coords(columns),
        images=tuple(name for name, value in arrays.items() if holds_images(value) and not is_binary(value)),
        notes=tuple(column.note for column in columns.values() if column.note),
    )


def _size(arrays: Mapping[str, Array]) -> int:
    """The common length of all arrays, whose values in memory are finite."""
    sizes = {name: len(value) for name, value in arrays.items()}
    if len(set(sizes.values())) > 1:
        found = ", ".join(f"{name} has {size}" for name, size in sizes.items())
        raise DataError(f"leading dimensions differ: {found}; give every site and covariate one row per datum")
    size = next(iter(sizes.values()))
    if size == 0:
        raise DataError(f"the data are empty: {listed(arrays)} with 0 rows; at least one datum is needed")
    for name, value in arrays.items():
        if getattr(value, "is_meta", False):
            raise DataError(f"{name!r} is on the device 'meta', where it has no values: make it on another device")
        bad = None if isinstance(value, np.memmap) else first_nonfinite(value)
        if bad is not None:
            raise DataError(not_finite(name, bad))
    return size


def _labels(columns: Mapping[str, Column]) -> np.ndarray | None:
    """The labels that all labelled columns share."""
    labelled = {name: column.labels for name, column in columns.items() if column.labels is not None}
    if not labelled:
        return None
    (first, wanted), *rest = labelled.items()
    for name, labels in rest:
        if len(labels) == len(wanted) and not np.array_equal(labels, wanted):
            has_same = set(labels.tolist()) == set(wanted.tolist())
            how = f"put them in one order, such as {name} = {name}.loc[{first}.index]; if" if has_same else "if"
            raise DataError(
                f"the rows of {name!r} have other labels than those of {first!r}, or another order: {how} the rows "
                f"belong together as they stand, give the values of {name!r} alone, {name}.to_numpy()"
            )
    return wanted


def _coords(columns: Mapping[str, Column]) -> dict[str, np.ndarray]:
    """Labels along the dimensions of all columns, which agree where they share a dimension."""
    found: dict[str, np.ndarray] = {}
    for name, column in columns.items():
        for dim, labels in column.coords.items():
            if dim in found and not np.array_equal(found[dim], labels):
                raise DataError(f"{name!r} has other labels along {dim!r} than another key: rename it")
            found[dim] = labels
    return found


def grey_names(source: Source, values: str | None) -> tuple[str, ...]:
    """The keys whose 8-bit grey values become other values.

    Args:
        source: the data.
        values: one of `VALUES` for all keys that hold 8-bit integers, None for images alone, "stored" for no key.

    Raises:
        DataError: for other `values`, and if no key holds 8-bit integers.
    """
    if values == "stored":
        return ()
    if values is None:
        return source.images
    if values not in VALUES:
        raise DataError(f"values={values!r} is given, wanted one of {', '.join(VALUES)}, stored")
    found = source.images
    if not isinstance(source.stored, Dataset):
        found = tuple(n for n, v in source.stored.items() if str(v.dtype).endswith("uint8") and v.ndim > 1)
    if not found:
        raise DataError(
            f"values={values!r} is for 8-bit images, and {listed(source.observed)} holds none: give values "
            "from 0 to 1 as (255 * x).round().to(torch.uint8), arrays as (255 * x).round().astype('uint8')"
        )
    return found


def grey_note(names: Sequence[str], values: str) -> str:
    """The sentence that says how 8-bit images are read."""
    return f"{listed(names)}: 8-bit grey values k are {WORDS[values]} (calibrant.data.as_data has values=)"


def with_rows(source: Source) -> Source:
    """The data with the place of every datum under the key `ROW`, by which its noise is drawn."""
    if isinstance(source.stored, Dataset):
        return replace(source, stored=_WithRows(source.stored), has_rows=True)
    return replace(source, stored={**source.stored, ROW: np.arange(source.size)}, has_rows=True)


class _WithRows(Dataset):
    """A Dataset of dicts with the place of every item under the key `ROW`."""

    def __init__(self, dataset: Any) -> None:
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {**self.dataset[index], ROW: index}

"""`Data`: observations and covariates of a program, kept as they are stored and made into tensors batch by batch."""

import hashlib
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from calibrant.data.arrays import (
    Index,
    checked_array,
    first_nonfinite,
    listed,
    not_finite,
    positions_of,
    row_blocks,
    take,
    tensor_of,
)
from calibrant.data.grey_values import grey_values
from calibrant.data.sources import Source, grey_names, grey_note, source_of, with_rows
from calibrant.errors import DataError
from calibrant.folders.tensors import bytes_of
from calibrant.shown import Shown, counted
from calibrant.streams import stream

Batch = dict[str, Tensor]
Transform = Callable[[Batch], Batch]
_ROWS_READ = 1024  # rows that `values` reads at a time


class Data(Shown):
    """Observations and covariates with one row per datum, and a label for every datum.

    Values stay as they are stored (integer images as integers, memmaps on disk) until `batch` makes tensors of the
    requested rows. The rows are read, checked for NaN and infinity, moved to the device, passed to `transform`, and
    cast: observations and floating covariates to the floating dtype, while integer and boolean covariates (labels,
    masks) keep their dtype.

    Args:
        observed: site name → tensor, array or memmap, leading dimension data; or another form that `as_data` takes: a
            table, or a map-style torch `Dataset` whose items have no such dimension. All keys of a `Dataset` are
            observations until `split_keys` separates them from the covariates.
        covariates: keyword of the program → tensor, array or memmap, leading dimension data. They cannot be given with
            a `Dataset`, whose items hold all keys.
        coords: name → labels, one per datum, which `subset` keeps. `data` is the index in the original data set (that
            of a table, or else 0, 1, …, unless given here) and must be unique, because results are joined on it.
        transform: a function of a whole batch, observations and covariates together in one dict, under the names and
            in the dtypes that they are stored in. It runs on the device and returns a dict with the same keys and the
            same leading dimension; the other dimensions, dtypes and values are its own. It is the only place where
            values change. Without it, 8-bit images are read as k/255, as `notes` says.
        name: name of the data set in reports.

    Attributes:
        dims: site or covariate → names of its dimensions after that of the data, where it came with names.
        event_coords: one of these dimensions → labels along it.
        notes: what was done to the data, in sentences: how grey values are read, the codes of categories.
        optional: keys that a program without them ignores (labels of a labelled data set).

    Raises:
        DataError: for anything but dicts of real-valued arrays with one common, nonzero leading dimension, or for
            values that are not finite. Arrays in memory are checked here, memmaps and Datasets as they are read.
    """

    def __init__(
        self,
        observed: Any,
        covariates: Any = None,
        coords: Mapping[str, Any] | None = None,
        transform: Transform | None = None,
        name: str = "",
    ) -> None:
        self.name = name
        self.transform = transform
        source = observed if isinstance(observed, Source) else source_of(observed, covariates)
        if transform is None and not isinstance(observed, Source):
            source, self.transform = _with_grey_values(source)
        self._source = source.stored
        self._stored = source.keys
        # Names that the program sees, each with the key that it is stored under: `select` may rename.
        self._observed = {key: key for key in source.observed}
        self._covariates = {key: key for key in source.covariates}
        self._rows = np.arange(source.size)
        labels = {} if source.labels is None else {"data": source.labels}
        self.coords = _checked_coords({**labels, **(coords or {})}, source.size)
        self.dims, self.event_coords = dict(source.dims), dict(source.event_coords)
        self.notes, self.optional = source.notes, source.optional

    @property
    def is_stored(self) -> bool:
        """Whether all values are stored arrays, which no reading can change; the items of a Dataset may be random."""
        return not isinstance(self._source, Dataset)

    @property
    def observed_names(self) -> tuple[str, ...]:
        """Names of the observations."""
        return tuple(self._observed)

    @property
    def covariate_names(self) -> tuple[str, ...]:
        """Names of the covariates."""
        return tuple(self._covariates)

    def keys(self) -> tuple[str, ...]:
        """Names of the observations, then of the covariates."""
        return (*self._observed, *self._covariates)

    def labels(self) -> np.ndarray:
        """The coordinate `data`: the index of each datum in the original data set, shape `(len(self),)`."""
        return self.coords["data"]

    def __len__(self) -> int:
        return len(self._rows)

    def facts(self) -> dict[str, str]:
        """The count, every key with its event shape and dtype as they are stored, and the coordinates."""
        found = {"": f"{f'`{self.name}`, ' if self.name else ''}{counted(len(self), 'datum', 'data')}"}
        for role, names in (("observed", self._observed), ("covariates", self._covariates)):
            if names:
                found[role] = ", ".join(f"`{name}` {self._kind(name, key)}".strip() for name, key in names.items())
        if labels := [name for name in self.coords if name != "data"]:
            found["coordinates"] = ", ".join(labels)
        if self.notes:
            found["notes"] = "; ".join(self.notes)
        elif self.transform is not None:
            found["values"] = "transformed when they are read"
        return found

    def _kind(self, name: str, key: str) -> str:
        """Event shape and dtype of a key as it is stored; nothing for the items of a Dataset, which are not read."""
        if isinstance(self._source, Dataset):
            return ""
        values, dims = self._source[key], self.dims.get(name, ())
        shape = list(map(str, values.shape[1:]))
        named = [f"{dim}: {size}" for dim, size in zip(dims, shape, strict=False)]
        return f"({', '.join(named or shape)}) {str(values.dtype).removeprefix('torch.')}"

    def __getitem__(self, index: Index) -> "Data":
        return self.subset(index)

    def subset(self, index: Index) -> "Data":
        """Select some of the data, without reading or copying them.

        Args:
            index: positions in this `Data` (slice, 1-d integers, or a boolean mask of its length). The coordinates are
                selected too, so that `coords["data"]` still is the index of each datum in the original data set.

        Raises:
            DataError: for an index that is empty, out of range, repeated (labels must be unique), or not 1-d.
        """
        positions = positions_of(index, len(self))
        named = np.zeros(len(self), dtype=bool)
        named[positions] = True
        if named.sum() < len(positions):
            raise DataError(
                "subset: the index names a datum twice, but results are joined on its label: repeat it in batch()"
            )
        part = self._copy()
        part._rows = self._rows[positions]
        part.coords = {name: labels[positions] for name, labels in self.coords.items()}
        return part

    def batch(
        self, index: Index, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> tuple[Batch, Batch]:
        """Return some of the data as tensors: (observed, covariates), transformed and cast.

        Args:
            index: positions in this `Data`, as for `subset`; repeats are allowed.
            device: device of the tensors, on which `transform` runs; None for the device on which they are stored.
            dtype: floating dtype; None for torch's default dtype.

        Raises:
            DataError: for a bad index, for values that are not finite, for Dataset items that differ in keys or
                shapes, or for a `transform` that changes the keys or the leading dimension.
        """
        positions = positions_of(index, len(self))
        batch = self._read(positions)
        if device is not None:
            batch = {key: value.to(device) for key, value in batch.items()}
        if self.transform is not None:
            batch = _transformed(batch, self.transform, len(positions))
        dtype = torch.get_default_dtype() if dtype is None else dtype
        observed = {name: batch[key].to(dtype) for name, key in self._observed.items()}
        covariates = {name: batch[key] for name, key in self._covariates.items()}
        return observed, {name: c.to(dtype) if c.is_floating_point() else c for name, c in covariates.items()}

    def values(self, name: str, index: Index = slice(None), device: torch.device | str | None = None) -> Tensor:
        """One observation or covariate of some of the data, transformed; integers keep their dtype.

        Other keys are read only where a `transform` needs them, a block of rows at a time.

        Args:
            name: an observation or a covariate.
            index: positions in this `Data`, as for `batch`.
            device: device of the tensor; None for the device on which it is stored.

        Raises:
            DataError: for a name that the data do not have, and for the reasons of `batch`.
        """
        stored = {**self._observed, **self._covariates}
        if name not in stored:
            raise DataError(f"the data have no {name!r}; there are: {listed(stored)}")
        part = self._copy()
        part._observed, part._covariates = {}, {name: stored[name]}
        positions = positions_of(index, len(self))
        blocks = np.array_split(positions, -(-len(positions) // _ROWS_READ))
        return torch.cat([part.batch(block, device)[1][name] for block in blocks])

    def tensors(
        self, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> tuple[Batch, Batch]:
        """Return all data as tensors, in one batch: (observed, covariates)."""
        return self.batch(slice(None), device, dtype)

    def fingerprint(self) -> str:
        """A sha256 of the data, 64 hexadecimal digits, which tells whether two results belong to the same data.

        It covers names, labels, and stored values of all observations and covariates, but of `transform` only what
        its method `fingerprint` tells, if it has one. They are read once, in blocks. Of a `Dataset`,
        whose items may be random, it covers keys, length and labels only.
        """
        found = hashlib.sha256(repr((sorted(self._observed), sorted(self._covariates), len(self))).encode())
        for name, labels in sorted(self.coords.items()):
            found.update(f"{name} {labels.dtype}".encode())
            found.update(repr(labels.tolist()).encode() if labels.dtype.hasobject else labels.tobytes())
        if callable(told := getattr(self.transform, "fingerprint", None)):
            found.update(told().encode())
        if isinstance(self._source, Dataset):
            return found.hexdigest()
        for name, key in sorted({**self._observed, **self._covariates}.items()):
            values = self._source[key]
            found.update(f"{name} {values.dtype} {tuple(values.shape[1:])}".encode())
            for block in row_blocks(len(self), int(np.prod(values.shape[1:]))):
                found.update(bytes_of(take(values, self._rows[block])))
        return found.hexdigest()

    def select(self, names: Collection[str] | Mapping[str, str]) -> "Data":
        """Select observations and covariates by name; a mapping {new name: current name} renames them.

        `transform` still gets all keys, under the names that they are stored under.

        Raises:
            DataError: for a name that the data do not have, or if no observation is left.
        """
        wanted = dict(names) if isinstance(names, Mapping) else {name: name for name in names}
        missing = sorted(set(wanted.values()) - {*self._observed, *self._covariates})
        if missing:
            known = ", ".join([*self._observed, *self._covariates])
            raise DataError(f"the data have no {', '.join(map(repr, missing))}; there are: {known}")
        part = self._copy()
        part.dims = {new: self.dims[old] for new, old in wanted.items() if old in self.dims}
        part.optional = frozenset(new for new, old in wanted.items() if old in self.optional)
        part._observed = {new: self._observed[old] for new, old in wanted.items() if old in self._observed}
        part._covariates = {new: self._covariates[old] for new, old in wanted.items() if old in self._covariates}
        if not part._observed:
            raise DataError(
                f"none of {', '.join(map(repr, wanted))} is an observation: keep one of {list(self._observed)}"
            )
        return part

    def split_keys(self, observed_names: Collection[str], covariate_names: Collection[str] = ()) -> "Data":
        """Sort the keys into observations and covariates of a program.

        Args:
            observed_names: the sites that the program samples: these keys are observations.
            covariate_names: the keywords that the program's `forward` names: these keys are covariates.

        Raises:
            DataError: for a key that is neither, for a name that is both, or if no key is an observation.
        """
        both = sorted(set(observed_names) & set(covariate_names))
        if both:
            raise DataError(
                f"{', '.join(map(repr, both))}: the program both samples it and takes it as a covariate: rename one"
            )
        stored = {**self._observed, **self._covariates}
        other = [key for key in stored if key not in observed_names and key not in covariate_names]
        allowed = f"observed sites: {listed(observed_names)}; covariates: {listed(covariate_names)}"
        if other:
            raise DataError(
                f"the program has no place for {', '.join(map(repr, other))} ({allowed}): "
                "leave it out with Data.select([...]), or rename it with Data.select({name in the program: name here})"
            )
        part = self._copy()
        part._observed = {key: stored[key] for key in stored if key in observed_names}
        part._covariates = {key: stored[key] for key in stored if key in covariate_names}
        if not part._observed:
            raise DataError(f"the data hold no observation, only {listed(stored)} ({allowed})")
        return part

    def _copy(self) -> "Data":
        """A new object with the same stored values, of which the caller then selects a part."""
        twin = object.__new__(Data)
        twin.__dict__.update(self.__dict__)
        return twin

    def _read(self, positions: np.ndarray) -> Batch:
        """The stored values at these positions, checked to be finite; keys that are not needed are not read."""
        rows = self._rows[positions]
        keys = self._stored if self.transform else (*self._observed.values(), *self._covariates.values())
        if isinstance(self._source, Dataset):
            batch = unchecked = _collate(self._source, rows, keys)
        else:
            batch = {key: take(self._source[key], rows) for key in keys}
            unchecked = {key: value for key, value in batch.items() if isinstance(self._source[key], np.memmap)}
        for key, value in unchecked.items():
            bad = first_nonfinite(value)
            if bad is not None:
                raise DataError(not_finite(key, self.labels()[positions[bad]]))
        return batch


def as_data(
    observed: Any,
    covariates: Any = None,
    *,
    names: Sequence[str] | None = None,
    values: str | None = None,
    seed: int = 0,
) -> Data:
    """Make a `Data` of observations in any form that people have them in; a `Data` is returned unchanged.

    Every public function that takes data calls this function.

    Args:
        observed: one of

            - a dict: site name → tensor, array, memmap, list, pandas Series, DataFrame (a vector with an entry for
              each column) or xarray DataArray, leading dimension data;
            - a DataFrame or xarray Dataset, with a key for every column or variable; a Series or DataArray with a name;
            - a torch Dataset, such as those of torchvision, or a part of one. Items are dicts, single values, or pairs
              of an observation and a label. A DataLoader stands for its Dataset.

            An index of pandas, a coordinate of xarray along the data, and the places in a `Subset` are the labels of
            the data; names of columns and dimensions become coordinates of results. Categories become their codes.
        covariates: the same for keywords of the program; not beside a torch Dataset, whose items hold all keys.
        names: names of the parts of an item of a Dataset; "x" and "y" if None. Programs without "y" ignore it.
        values: what 8-bit grey values k become: "unit" (k/255), "dequantised", "binarised" or "thresholded" as in
            `load`; "stored" keeps them. If None, arrays of the shape of images, with one, three or four channels and at
            least 8×8 pixels, are "unit", unless all values are 0 or 1, and all other integers stay as they are.
        seed: random seed for "dequantised" and "binarised".

    Raises:
        DataError: for everything else, for missing values, text and dates, and for options or covariates that are given
            in addition to a `Data`. The message says what to do.
    """
    if isinstance(observed, Data):
        if covariates is not None and len(covariates):
            raise DataError("covariates were given beside a Data: put them into it, Data(observed, covariates=...)")
        if names is not None or values is not None:
            raise DataError("names= and values= were given beside a Data: give them where the Data is made")
        return observed
    source, transform = _with_grey_values(source_of(observed, covariates, names), values, seed)
    return Data(source, transform=transform)


def _with_grey_values(source: Source, values: str | None = None, seed: int = 0) -> tuple[Source, Transform | None]:
    """The data with a note on their grey values, and the transform that changes these; None if nothing is changed."""
    names = grey_names(source, values)
    if not names:
        return source, None
    values = values or "unit"
    source = replace(source, notes=(*source.notes, grey_note(names, values)))
    if values in ("dequantised", "binarised"):
        source = with_rows(source)
    return source, _Stated(values, stream(seed, "grey values"), names)


@dataclass(frozen=True)
class _Stated:
    """A transform of grey values that is a part of the fingerprint of the data."""

    values: str
    key: int
    names: tuple[str, ...]

    def __call__(self, batch: Batch) -> Batch:
        return grey_values(self.values, self.key, self.names)(batch)

    def fingerprint(self) -> str:
        key = self.key if self.values in ("dequantised", "binarised") else 0
        return f"{self.values} {key} {sorted(self.names)}"


def _checked_coords(coords: Mapping[str, Any], size: int) -> dict[str, np.ndarray]:
    """Labels as 1-d arrays, including `data`."""
    labels = {"data": np.arange(size)}
    for name, values in coords.items():
        array = values.cpu().numpy() if isinstance(values, Tensor) else np.asarray(values)
        if array.shape != (size,):
            raise DataError(f"coords[{name!r}] has shape {array.shape}: give one label per datum, shape ({size},)")
        labels[name] = _storable(array) if name == "data" else array
    if "data" in coords and _distinct(labels["data"]) < size:
        raise DataError("coords['data'] repeats a label: results are joined on it, so every datum needs its own")
    return labels


def _distinct(labels: np.ndarray) -> int:
    """Number of distinct labels; whole numbers are sorted, which takes a fifth of the time of a set."""
    return len(np.unique(labels) if labels.dtype.kind in "iu" else set(labels.tolist()))


def _storable(labels: np.ndarray) -> np.ndarray:
    """Labels that results can be joined on and stored with: numbers or strings; dates become strings."""
    if labels.dtype.kind == "M":
        return np.datetime_as_string(labels, unit="auto")
    if labels.dtype.kind != "O" or all(isinstance(label, str) for label in labels):
        return labels
    if all(hasattr(label, "__index__") for label in labels):
        return labels.astype(np.int64)
    kinds = ", ".join(sorted({type(label).__name__ for label in labels}))
    raise DataError(
        f"coords['data'] holds labels of the kind {kinds}: give whole numbers, or strings: list(map(str, labels))"
    )


def _collate(dataset: Dataset, rows: np.ndarray, keys: Collection[str]) -> Batch:
    """Items of a Dataset stacked key by key."""
    items = [dataset[int(row)] for row in rows]
    for row, item in zip(rows, items, strict=True):
        if not isinstance(item, Mapping) or not set(keys) <= set(item):
            found = f"the keys {listed(item)}" if isinstance(item, Mapping) else f"no dict, but a {type(item).__name__}"
            raise DataError(f"item {row} of the Dataset has {found}: every item must be a dict with {listed(keys)}")
    return {key: _stack(key, rows, [item[key] for item in items]) for key in keys}


def _stack(key: str, rows: np.ndarray, values: Sequence[Any]) -> Tensor:
    """One key of several items as a tensor with the leading dimension data."""
    arrays = [value.detach() if isinstance(value, Tensor) else np.asanyarray(value) for value in values]
    for row, array in zip(rows, arrays, strict=True):
        if array.shape != arrays[0].shape or array.dtype != arrays[0].dtype:
            raise DataError(
                f"{key} has shape {tuple(array.shape)} and dtype {array.dtype} in item {row} of the Dataset, but "
                f"{tuple(arrays[0].shape)} and {arrays[0].dtype} in item {rows[0]}: they must agree"
            )
        checked_array(key, array[None])
    return torch.stack([array if isinstance(array, Tensor) else tensor_of(array) for array in arrays])


def _transformed(batch: Batch, transform: Transform, size: int) -> Batch:
    """Transform a batch, and check that the result has the same keys and rows."""
    result = transform(dict(batch))
    if not isinstance(result, Mapping) or set(result) != set(batch):
        found = f"the keys {listed(result)}" if isinstance(result, Mapping) else f"a {type(result).__name__}"
        raise DataError(f"transform returned {found}: return a dict with the keys {listed(batch)}")
    for key, value in result.items():
        if not isinstance(value, Tensor) or value.shape[:1] != (size,):
            found = str(tuple(value.shape)) if isinstance(value, Tensor) else f"a {type(value).__name__}"
            raise DataError(
                f"transform returned {key} with shape {found}: a tensor with leading dimension {size} is needed"
            )
    return dict(result)

"""`Data`: observations and covariates of a program, kept as they are stored and made into tensors batch by batch."""

import hashlib
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset, IterableDataset

from calibrant.errors import DataError
from calibrant.folders.tensors import bytes_of

Array = Tensor | np.ndarray
Batch = dict[str, Tensor]
Transform = Callable[[Batch], Batch]
Index = slice | Sequence[int] | np.ndarray | Tensor

CHECKED_AT_ONCE = 2**22  # numbers searched for NaN at a time, which keeps the memory below some tens of MB
_ROWS_READ = 1024  # rows that `values` reads at a time


class Data:
    """Observations and covariates with one row per datum, and a label for every datum.

    Values stay as they are stored (integer images as integers, memmaps on disk) until `batch` makes tensors of the
    requested rows. The rows are read, checked for NaN and infinity, moved to the device, passed to `transform`, and
    cast: observations and floating covariates to the floating dtype, while integer and boolean covariates (labels,
    masks) keep their dtype.

    Args:
        observed: site name → tensor, array or memmap, leading dimension data; or one map-style torch `Dataset` whose
            items are dicts without that dimension. All its keys are observations until `split_keys` separates them
            from the covariates.
        covariates: keyword of the program → tensor, array or memmap, leading dimension data. They cannot be given with
            a `Dataset`, whose items hold all keys.
        coords: name → labels, one per datum, which `subset` keeps. `data` is the index in the original data set (0, 1,
            … unless given here) and must be unique, because results are joined on it.
        transform: a function of a whole batch, observations and covariates together in one dict, under the names and
            in the dtypes that they are stored in. It runs on the device and returns a dict with the same keys and the
            same leading dimension; the other dimensions, dtypes and values are its own. It is the only place where
            values change.
        name: name of the data set in reports.

    Raises:
        DataError: for anything but dicts of real-valued arrays with one common, nonzero leading dimension, or for
            values that are not finite. Arrays in memory are checked here, memmaps and Datasets as they are read.
    """

    def __init__(
        self,
        observed: Mapping[str, Array] | Dataset,
        covariates: Mapping[str, Array] | None = None,
        coords: Mapping[str, Any] | None = None,
        transform: Transform | None = None,
        name: str = "",
    ) -> None:
        covariates = {} if covariates is None else covariates
        self.name = name
        self.transform = transform
        self._source: dict[str, Array] | Dataset
        if isinstance(observed, Dataset):
            keys, size = _inspect_dataset(observed, covariates)
            self._source, self._covariates = observed, {}
        else:
            self._source, size = _checked_arrays(observed, covariates)
            keys, self._covariates = list(observed), {key: key for key in covariates}
        self._stored = (*keys, *self._covariates)
        # Names that the program sees, each with the key that it is stored under: `select` may rename.
        self._observed = {key: key for key in keys}
        self._rows = np.arange(size)
        self.coords = _checked_coords({} if coords is None else coords, size)

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

    def __repr__(self) -> str:
        names = f"observed={list(self._observed)}, covariates={list(self._covariates)}"
        return f"Data({self.name!r}, {len(self)} data, {names})"

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
        positions = _positions(index, len(self))
        if len(np.unique(positions)) < len(positions):
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
        positions = _positions(index, len(self))
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
            raise DataError(f"the data have no {name!r}; there are: {_listed(stored)}")
        part = self._copy()
        part._observed, part._covariates = {}, {name: stored[name]}
        positions = _positions(index, len(self))
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
            for block in _row_blocks(len(self), int(np.prod(values.shape[1:]))):
                found.update(bytes_of(_take(values, self._rows[block])))
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
        allowed = f"observed sites: {_listed(observed_names)}; covariates: {_listed(covariate_names)}"
        if other:
            raise DataError(
                f"the program has no place for {', '.join(map(repr, other))} ({allowed}): "
                "leave it out with Data.select([...]), or rename it with Data.select({name in the program: name here})"
            )
        part = self._copy()
        part._observed = {key: stored[key] for key in stored if key in observed_names}
        part._covariates = {key: stored[key] for key in stored if key in covariate_names}
        if not part._observed:
            raise DataError(f"the data hold no observation, only {_listed(stored)} ({allowed})")
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
            batch = {key: _take(self._source[key], rows) for key in keys}
            unchecked = {key: value for key, value in batch.items() if isinstance(self._source[key], np.memmap)}
        for key, value in unchecked.items():
            bad = _first_nonfinite(value)
            if bad is not None:
                raise DataError(_not_finite(key, self.labels()[positions[bad]]))
        return batch


def as_data(observed: Mapping[str, Array] | Dataset | Data, covariates: Mapping[str, Array] | None = None) -> Data:
    """Make a `Data` of observations in any accepted form; a `Data` is returned unchanged.

    Raises:
        DataError: for observations or covariates that `Data` refuses, and for covariates that are given in addition to
            a `Data`, which has its own.
    """
    if not isinstance(observed, Data):
        return Data(observed, covariates)
    if covariates:
        raise DataError("covariates were given beside a Data: put them into it, Data(observed, covariates=...)")
    return observed


def _inspect_dataset(dataset: Dataset, covariates: Mapping[str, Array]) -> tuple[list[str], int]:
    """Keys and length of a map-style Dataset of dicts, from its first item."""
    if covariates:
        raise DataError("covariates were given beside a Dataset: return them in its items, under the names of forward")
    if isinstance(dataset, IterableDataset) or not hasattr(dataset, "__len__"):
        kind = type(dataset).__name__
        raise DataError(f"{kind} has no length: give a map-style Dataset, with __len__ and __getitem__")
    if len(dataset) == 0:
        raise DataError(f"the {type(dataset).__name__} is empty: at least one datum is needed")
    item = dataset[0]
    if not isinstance(item, Mapping):
        raise DataError(f"item 0 of the Dataset is a {type(item).__name__}: return a dict, such as {{'x': image}}")
    if not item:
        raise DataError("item 0 of the Dataset is an empty dict: return at least one observation, such as {'x': image}")
    return list(item), len(dataset)


def _checked_arrays(observed: Mapping[str, Array], covariates: Mapping[str, Array]) -> tuple[dict[str, Array], int]:
    """All arrays in one dict, and their common leading dimension."""
    for role, values in (("observed", observed), ("covariates", covariates)):
        if not isinstance(values, Mapping):
            raise DataError(
                f"{role} is a {type(values).__name__}: give a dict from names to arrays, such as {{'x': array}}"
            )
    if not observed:
        raise DataError("observed is empty: give at least one observed site, such as {'x': array}")
    twice = sorted(set(observed) & set(covariates))
    if twice:
        raise DataError(
            f"{', '.join(map(repr, twice))}: given both as an observation and as a covariate: leave one out"
        )
    arrays = {name: _checked_array(name, value) for name, value in {**observed, **covariates}.items()}
    sizes = {name: len(value) for name, value in arrays.items()}
    if len(set(sizes.values())) > 1:
        found = ", ".join(f"{name} has {size}" for name, size in sizes.items())
        raise DataError(f"leading dimensions differ: {found}; give every site and covariate one row per datum")
    size = next(iter(sizes.values()))
    if size == 0:
        raise DataError(f"the data are empty: {_listed(arrays)} with 0 rows; at least one datum is needed")
    for name, value in arrays.items():
        if isinstance(value, Tensor) and value.is_meta:
            raise DataError(f"{name!r} is on the device 'meta', where it has no values: make it on another device")
        bad = None if isinstance(value, np.memmap) else _first_nonfinite(value)
        if bad is not None:
            raise DataError(_not_finite(name, bad))
    return arrays, size


def _checked_array(name: object, value: object) -> Array:
    """Check that a value is a tensor or array of real numbers with a leading dimension, and return it."""
    if not isinstance(name, str):
        raise DataError(f"a site or covariate is called {name!r}: names are strings")
    if isinstance(value, np.ma.MaskedArray):
        raise DataError(
            f"{name} is a masked array: give its values with a value inside the support in every masked entry, "
            f"{name}.filled(VALUE), and the mask as a covariate that the program takes, ~numpy.ma.getmaskarray({name})"
        )
    if isinstance(value, Data):
        raise DataError(f"{name} is a split of a data set: give one split alone, such as data[{name!r}]")
    if not isinstance(value, Tensor | np.ndarray):
        raise DataError(f"{name} is a {type(value).__name__}: give a tensor or a numpy array, numpy.asarray({name})")
    real = value.dtype.kind in "biuf" if isinstance(value, np.ndarray) else not value.dtype.is_complex
    if not real:
        raise DataError(f"{name} has dtype {value.dtype}: give real numbers (float, integer or bool)")
    if isinstance(value, Tensor) and value.layout is not torch.strided:
        raise DataError(f"{name} is a sparse tensor: give a dense one, {name}.to_dense()")
    if value.ndim == 0:
        raise DataError(f"{name} has shape (): its leading dimension must be the data")
    return value.detach() if isinstance(value, Tensor) else value


def _checked_coords(coords: Mapping[str, Any], size: int) -> dict[str, np.ndarray]:
    """Labels as 1-d arrays, including `data`."""
    labels = {"data": np.arange(size)}
    for name, values in coords.items():
        array = values.cpu().numpy() if isinstance(values, Tensor) else np.asarray(values)
        if array.shape != (size,):
            raise DataError(f"coords[{name!r}] has shape {array.shape}: give one label per datum, shape ({size},)")
        labels[name] = array
    if "data" in coords and len(set(labels["data"].tolist())) < size:
        raise DataError("coords['data'] repeats a label: results are joined on it, so every datum needs its own")
    return labels


def _positions(index: Index, size: int) -> np.ndarray:
    """An index as nonnegative positions, 1-d and not empty."""
    if isinstance(index, slice):
        array = np.arange(size)[index]
    else:
        array = index.cpu().numpy() if isinstance(index, Tensor) else np.asarray(index)
        if array.ndim != 1:
            raise DataError(f"the index has shape {array.shape}: give a slice, 1-d integers or a boolean mask")
        if array.dtype == bool:
            if len(array) != size:
                raise DataError(f"the boolean index has length {len(array)}, the data {size}: they must agree")
            array = np.flatnonzero(array)
    if len(array) == 0:
        raise DataError(f"the index selects none of the {size} data")
    if array.dtype.kind not in "iu":
        raise DataError(f"the index has dtype {array.dtype}: give a slice, 1-d integers or a boolean mask")
    outside = array[(array < -size) | (array >= size)]
    if len(outside):
        raise DataError(f"index {outside[0]} is out of range: there are {size} data")
    return np.where(array < 0, array + size, array).astype(np.int64)


def _take(value: Array, rows: np.ndarray) -> Tensor:
    """Copy rows of an array or tensor into a tensor, on the device that holds them."""
    if isinstance(value, Tensor):
        return value[torch.from_numpy(rows).to(value.device)]
    return _tensor(value[rows])


def _tensor(array: np.ndarray) -> Tensor:
    """A numpy array as a tensor; byte orders and widths that torch lacks are converted."""
    if array.dtype == np.longdouble:
        array = array.astype(np.float64)
    return torch.from_numpy(np.require(array, array.dtype.newbyteorder("="), ["C", "W"]))


def _collate(dataset: Dataset, rows: np.ndarray, keys: Collection[str]) -> Batch:
    """Items of a Dataset stacked key by key."""
    items = [dataset[int(row)] for row in rows]
    for row, item in zip(rows, items, strict=True):
        if not isinstance(item, Mapping) or not set(keys) <= set(item):
            found = (
                f"the keys {_listed(item)}" if isinstance(item, Mapping) else f"no dict, but a {type(item).__name__}"
            )
            raise DataError(f"item {row} of the Dataset has {found}: every item must be a dict with {_listed(keys)}")
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
        _checked_array(key, array[None])
    return torch.stack([array if isinstance(array, Tensor) else _tensor(array) for array in arrays])


def _transformed(batch: Batch, transform: Transform, size: int) -> Batch:
    """Transform a batch, and check that the result has the same keys and rows."""
    result = transform(dict(batch))
    if not isinstance(result, Mapping) or set(result) != set(batch):
        found = f"the keys {_listed(result)}" if isinstance(result, Mapping) else f"a {type(result).__name__}"
        raise DataError(f"transform returned {found}: return a dict with the keys {_listed(batch)}")
    for key, value in result.items():
        if not isinstance(value, Tensor) or value.shape[:1] != (size,):
            found = str(tuple(value.shape)) if isinstance(value, Tensor) else f"a {type(value).__name__}"
            raise DataError(
                f"transform returned {key} with shape {found}: a tensor with leading dimension {size} is needed"
            )
    return dict(result)


def _row_blocks(size: int, row_numbers: int) -> Iterator[np.ndarray]:
    """Blocks of consecutive rows, each with at most `CHECKED_AT_ONCE` numbers (or one row)."""
    step = max(1, CHECKED_AT_ONCE // max(1, row_numbers))
    for start in range(0, size, step):
        yield np.arange(start, min(size, start + step))


def _first_nonfinite(value: Array) -> int | None:
    """The first row that holds NaN or infinity."""
    floating = value.dtype.is_floating_point if isinstance(value, Tensor) else value.dtype.kind == "f"
    if not floating:
        return None
    for rows in _row_blocks(len(value), int(np.prod(value.shape[1:]))):
        finite = torch.isfinite(_take(value, rows)).reshape(len(rows), -1).all(1)
        if not finite.all():
            return int(rows[0] + (~finite).nonzero()[0, 0])
    return None


def _not_finite(name: str, label: object) -> str:
    return (
        f"{name} holds NaN or infinity, first at data index {label}: leave such data out (Data.subset), or give "
        "missing entries a value inside the support, and the program a mask as a covariate"
    )


def _listed(names: Collection[str]) -> str:
    return ", ".join(map(str, names)) or "none"

"""Columns of data in the forms that people have: pandas, xarray, lists; the values with the names that they bring."""

from __future__ import annotations

import sys
from collections.abc import Hashable, Mapping
from dataclasses import dataclass, field
from typing import Any, NoReturn

import numpy as np
import torch
from torch import Tensor

from calibrant.data.arrays import Array, listed
from calibrant.errors import DataError

Names = Mapping[str, np.ndarray]
_OF_RESULTS = ("chain", "draw", "data")  # names of dimensions that results have


@dataclass(frozen=True)
class Column:
    """The values of one site or covariate, and the names that came with them.

    Attributes:
        values: tensor or array, leading dimension data.
        labels: one label per datum; None where there are none.
        dims: names of the other dimensions; () where they have none.
        coords: dimension → labels along it.
        note: what was done to the values, a sentence; "" if nothing was.
    """

    values: Array
    labels: np.ndarray | None = None
    dims: tuple[str, ...] = ()
    coords: Names = field(default_factory=dict)
    note: str = ""


def is_frame(value: object) -> bool:
    """Whether a value is a DataFrame of pandas."""
    return "pandas" in sys.modules and isinstance(value, sys.modules["pandas"].DataFrame)


def _is_series(value: object) -> bool:
    return "pandas" in sys.modules and isinstance(value, sys.modules["pandas"].Series)


def _is_array_of_xarray(value: object) -> bool:
    return "xarray" in sys.modules and isinstance(value, sys.modules["xarray"].DataArray)


def _is_dataset_of_xarray(value: object) -> bool:
    return "xarray" in sys.modules and isinstance(value, sys.modules["xarray"].Dataset)


def is_table(value: object) -> bool:
    """Whether a value is a table or a column of one, of pandas or xarray."""
    return any(kind(value) for kind in (is_frame, _is_series, _is_array_of_xarray, _is_dataset_of_xarray))


def mapping_of(value: object) -> object:
    """A table as a mapping from names to columns; any other value unchanged.

    Args:
        value: a DataFrame (a key for every column), an xarray Dataset (a key for every variable), or a Series or
            DataArray with a name.

    Raises:
        DataError: for a Series or DataArray without a name, names that repeat or are no strings, and an xarray Dataset
            without a dimension that is that of the data.
    """
    if is_frame(value):
        return _columns(value)
    if _is_dataset_of_xarray(value):
        return _variables(value)
    if _is_series(value) or _is_array_of_xarray(value):
        kind, name = type(value).__name__, getattr(value, "name", None)
        if not isinstance(name, str):
            raise DataError(f"the {kind} has no name: give a dict with the name of its site, such as {{'x': values}}")
        return {name: value}
    return value


def column_of(name: object, value: Any) -> Column:
    """One site or covariate from a list, a Series, a DataFrame (one entry per column) or a DataArray.

    Other values are returned unchanged, for `checked_array` to take or refuse.

    Raises:
        DataError: for missing values, text, dates, and lists that are no single array; the message has the remedy.
    """
    if is_frame(value):
        return _matrix(str(name), value)
    if _is_series(value):
        return _series(str(name), value, repr(name))
    if _is_array_of_xarray(value):
        return _labelled(str(name), value)
    if isinstance(value, list | tuple):
        return Column(_list(name, value))
    if hasattr(value, "observed_names"):
        raise DataError(f"{name} is a split of a data set: give one split alone, such as data[{name!r}]")
    if remedy := _REMEDIES.get(_kind(value)):
        raise DataError(f"{name} is a {type(value).__name__} of {_kind(value)[0]}: give {remedy.format(name=name)}")
    return Column(value)


_REMEDIES = {
    ("scipy", "sparse"): "{name}.toarray()",
    ("polars", "DataFrame"): "{name}.to_pandas()",
    ("polars", "Series"): "{name}.to_pandas()",
    ("anndata", "AnnData"): "{name}.to_df()",
}


def _kind(value: object) -> tuple[str, str]:
    """Package and class of a value; all sparse arrays of scipy are one."""
    package, _, rest = type(value).__module__.partition(".")
    return package, "sparse" if rest.startswith("sparse") else type(value).__name__


# -- lists -------------------------------------------------------------------------------------------------------------


def _list(name: object, value: list[Any] | tuple[Any, ...]) -> Array:
    if value and all(isinstance(part, Tensor) for part in value):
        if len({tuple(part.shape) for part in value}) > 1:
            raise _ragged(name)
        return torch.stack(list(value))
    try:
        array = np.asarray(value)
    except ValueError as error:
        raise _ragged(name) from error
    if array.dtype.kind in "US":
        raise DataError(
            f"{name} is a list of text: give numbers, such as numpy.unique({name}, return_inverse=True)[1], the places "
            "of its values in their sorted order"
        )
    if array.dtype == object:
        raise DataError(f"{name} holds values that are no numbers, such as None: leave such data out")
    return array


def _ragged(name: object) -> DataError:
    return DataError(f"{name} is a list whose rows differ in length: give every datum equally many numbers")


# -- pandas ------------------------------------------------------------------------------------------------------------


def _columns(frame: Any) -> dict[str, Any]:
    names = list(frame.columns)
    if repeated := sorted({str(name) for name in names if names.count(name) > 1}):
        raise DataError(f"the DataFrame has several columns {repeated[0]!r}: rename them, as every column is a key")
    if odd := [name for name in names if not isinstance(name, str)]:
        raise DataError(
            f"the DataFrame has a column {odd[0]!r}: names are strings; if all columns are one vector of a site, give "
            "{'SITE': frame} with the name of that site"
        )
    return {name: frame[name] for name in names}


def _matrix(name: str, frame: Any) -> Column:
    """A frame as the vector of one site, with an entry for each column."""
    if not len(frame.columns):
        raise DataError(f"{name} is a DataFrame without columns: choose one or more, frame[['NAME', 'NAME']]")
    parts = [_series(name, frame.iloc[:, i], f"{name}[{column!r}]") for i, column in enumerate(frame.columns)]
    if noted := [part.note for part in parts if part.note]:
        raise DataError(f"{name} mixes numbers and categories ({noted[0]}): make each category a key of its own")
    labels = np.array([str(column) for column in frame.columns])
    dim = frame.columns.name if isinstance(frame.columns.name, str) else f"{name}_dim_0"
    return Column(np.stack([part.values for part in parts], 1), parts[0].labels, (dim,), {dim: labels})


def _series(name: str, series: Any, where: str) -> Column:
    pd = sys.modules["pandas"]
    if not series.index.is_unique:
        raise DataError(
            f"the index of {where} repeats the label {series.index[series.index.duplicated()][0]!r}: results are "
            "joined on it, so call reset_index(drop=True) first"
        )
    if bool((missing := series.isna()).any()):
        raise _missing(name, where, series.index[missing.to_numpy()][0])
    labels, kind = _labels(series.index), series.dtype
    if isinstance(kind, pd.CategoricalDtype):
        codes = ", ".join(f"{category} = {code}" for code, category in enumerate(kind.categories))
        return Column(series.cat.codes.to_numpy().astype(np.int64), labels, note=f"{where} has the codes {codes}")
    if pd.api.types.is_datetime64_any_dtype(kind) or pd.api.types.is_timedelta64_dtype(kind):
        raise DataError(f"{where} holds dates or durations: give numbers, such as (t - t.min()).dt.days")
    if not pd.api.types.is_numeric_dtype(kind):
        raise DataError(
            f"{where} holds text or mixed values (dtype {kind}): leave it out, or make it a category, whose codes are "
            f"taken, frame.astype({{{_plain(where, name)!r}: 'category'}})"
        )
    return Column(np.ascontiguousarray(series.to_numpy()) if _is_numpy(kind) else _from_nullable(series), labels)


def _plain(where: str, name: str) -> str:
    """The name of a column, from the words for it."""
    return where.removeprefix(f"{name}[").removesuffix("]").strip("'\"")


def _is_numpy(kind: Any) -> bool:
    return isinstance(kind, np.dtype)


def _from_nullable(series: Any) -> np.ndarray:
    """Values of a nullable dtype, such as Int64 or boolean, in numpy's dtype; none is missing."""
    kind = {"b": np.bool_, "i": np.int64, "u": np.int64}.get(getattr(series.dtype, "kind", "f"), np.float64)
    return np.asarray(series.to_numpy(dtype=kind))


def _labels(index: Any) -> np.ndarray:
    """Labels of rows: 0, 1, … too, since rows in this order do not fit a table of the same labels in another order.

    Several levels are joined to one text.
    """
    pd = sys.modules["pandas"]
    if isinstance(index, pd.MultiIndex):
        return np.array([", ".join(map(str, label)) for label in index])
    values = index.to_numpy()
    return values if values.dtype.kind in "iufM" else np.array([str(label) for label in index])


def _missing(name: str, where: str, label: Hashable) -> DataError:
    return DataError(
        f"{where} has missing values, first at {label!r}: drop such rows, frame.dropna(), or give {name!r} as "
        f"values.fillna(0.0) and the program a mask as a covariate, values.notna()"
    )


# -- xarray ------------------------------------------------------------------------------------------------------------


def _variables(dataset: Any) -> dict[str, Any]:
    """The variables of a Dataset, with the dimension of the data first."""
    arrays = {str(name): array for name, array in dataset.data_vars.items()}
    if not arrays:
        raise DataError("the xarray Dataset has no variables: give at least one observed site")
    common = [dim for dim in next(iter(arrays.values())).dims if all(dim in array.dims for array in arrays.values())]
    if "data" in common:
        first: Hashable = "data"
    elif len(common) == 1:
        first = common[0]
    else:
        found = f"several dimensions, {listed([str(d) for d in common])}," if common else "no dimension"
        raise DataError(
            f"the variables {listed(arrays)} of the xarray Dataset have {found} in common: call that of the data "
            "'data', dataset.rename({'NAME': 'data'}), and leave out variables without it, dataset.drop_vars('NAME')"
        )
    return {name: array.transpose(first, ...) for name, array in arrays.items()}


def _labelled(name: str, array: Any) -> Column:
    """A DataArray: its dimension `data`, or else the first one, is that of the data."""
    if not array.dims:
        raise DataError(f"{name} has shape (): its leading dimension must be the data")
    array = array.transpose("data", ...) if "data" in array.dims else array
    first, *rest = map(str, array.dims)
    if taken := [dim for dim in rest if dim in _OF_RESULTS]:
        raise DataError(
            f"{name} has a dimension {taken[0]!r} beside that of the data, which results use: rename it, "
            f"array.rename({{{taken[0]!r}: 'NAME'}})"
        )
    if array.dtype.kind == "f" and bool(array.isnull().any()):
        _raise_missing(name, array)
    coords = {dim: np.asarray(array.indexes[dim]) for dim in rest if dim in array.indexes}
    labels = _labels(array.indexes[first]) if first in array.indexes else None
    if labels is not None and len(np.unique(labels)) < len(labels):
        raise DataError(f"the coordinate {first!r} of {name} repeats a label: results are joined on it; drop it first")
    return Column(np.asarray(array.values), labels, tuple(rest), coords)


def _raise_missing(name: str, array: Any) -> NoReturn:
    first = str(array.dims[0])
    raise DataError(
        f"{name} has missing values: drop such data, array.dropna({first!r}), or give array.fillna(0.0) and the "
        "program a mask as a covariate, array.notnull()"
    )

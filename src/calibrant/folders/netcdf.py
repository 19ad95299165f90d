"""Result trees and datasets as NetCDF files."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import xarray as xr

from calibrant.errors import RunError
from calibrant.folders.files import new_file


def save_tree(tree: xr.DataTree, path: str | Path) -> None:
    """Write a result tree as NetCDF.

    Raises:
        RunError: for attributes that are not strings or numbers, or values that NetCDF cannot hold.
    """
    for node in tree.subtree:
        _check_attributes(node.to_dataset())
    _write_netcdf(Path(path), tree.to_netcdf)


def load_tree(path: str | Path) -> xr.DataTree:
    """Load a result tree with the values, dtypes, coordinates and attributes that it was saved with.

    Raises:
        RunError: for a file that is missing or cannot be read.
    """
    tree = _read_netcdf(Path(path), xr.load_datatree)
    return xr.DataTree.from_dict({node.path: _plain(node.to_dataset(inherit=False)) for node in tree.subtree})


def save_dataset(dataset: xr.Dataset, path: str | Path) -> None:
    """Write a dataset as NetCDF; it raises the errors of `save_tree`."""
    _check_attributes(dataset)
    _write_netcdf(Path(path), dataset.to_netcdf)


def load_dataset(path: str | Path) -> xr.Dataset:
    """Load a dataset as it was saved; it raises the errors of `load_tree`."""
    return _plain(_read_netcdf(Path(path), xr.load_dataset))


def _check_attributes(dataset: xr.Dataset) -> None:
    for owner in _with_attributes(dataset):
        for name, value in owner.attrs.items():
            if isinstance(value, bool) or not isinstance(value, str | int | float | np.integer | np.floating):
                raise RunError(
                    f"attribute {name!r} is a {type(value).__name__}: NetCDF takes strings and numbers, so give an "
                    "integer for a truth value and a JSON string for anything else"
                )


def _with_attributes(dataset: xr.Dataset) -> list[Any]:
    return [dataset, *dataset.variables.values()]


def _write_netcdf(path: Path, write: Callable[..., Any]) -> None:
    with new_file(path) as new:
        try:
            write(new, engine="h5netcdf")
        except (TypeError, ValueError) as error:
            raise RunError(f"{path.name} can't be written as NetCDF: {error}") from error


def _read_netcdf(path: Path, read: Callable[..., Any]) -> Any:
    if not path.is_file():
        raise RunError(f"there is no file {path}")
    try:
        return read(path, engine="h5netcdf")
    except (OSError, ValueError, KeyError, RuntimeError, TypeError) as error:
        raise RunError(f"{path} is damaged ({error}): compute it again with calibrant check {path.parent}") from error


def _plain(dataset: xr.Dataset) -> xr.Dataset:
    """The dataset with attributes as Python numbers, and without information about its storage in the file."""
    dataset = dataset.drop_encoding()
    for owner in _with_attributes(dataset):
        owner.attrs = {
            name: value.item() if isinstance(value, np.generic) else value for name, value in owner.attrs.items()
        }
    return dataset

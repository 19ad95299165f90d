"""Result trees and datasets as NetCDF files, whose sha256 is recorded if they lie in a run folder."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import xarray as xr

from calibrant.errors import RunError
from calibrant.folders.files import digest_of_file, new_file
from calibrant.folders.records import check_unchanged, record


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
        RunError: for a file that is missing, cannot be read, reads other files, or is not the one that was written into
            its run folder.
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
        record(path, digest_of_file(new))


def _read_netcdf(path: Path, read: Callable[..., Any]) -> Any:
    if not path.is_file():
        raise RunError(f"there is no file {path}")
    remedy = f"compute it again with calibrant check {path.parent}"
    check_unchanged(path, remedy)
    try:
        _check_self_contained(path)
        found = read(path, engine="h5netcdf")
        for node in found.subtree if isinstance(found, xr.DataTree) else (found,):
            _check_attributes(_plain(node.to_dataset() if isinstance(node, xr.DataTree) else node))
        return found
    except Exception as error:  # a damaged file raises errors of any kind in HDF5, h5netcdf and xarray
        raise RunError(f"{path} is damaged ({error}): {remedy}") from error


def _check_self_contained(path: Path) -> None:
    """Refuse a file that would make HDF5 read other files."""

    def check(name: str, link: Any) -> None:
        if isinstance(link, h5py.ExternalLink | h5py.SoftLink):
            raise RunError(f"{name} is a link to something else")
        if isinstance(found := file[name], h5py.Dataset) and (found.external or found.is_virtual):
            raise RunError(f"the values of {name} lie in another file")

    with h5py.File(path, "r") as file:
        file.visititems_links(check)


def _plain(dataset: xr.Dataset) -> xr.Dataset:
    """The dataset with attributes as Python numbers, and without information about its storage in the file."""
    dataset = dataset.drop_encoding()
    for owner in _with_attributes(dataset):
        owner.attrs = {
            name: value.item() if isinstance(value, np.generic) else value for name, value in owner.attrs.items()
        }
    return dataset

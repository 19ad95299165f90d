"""Datasets of xarray in the files of cells, for pictures: the bytes of a NetCDF file as an array."""

from __future__ import annotations

import io
from collections.abc import Iterable

import numpy as np
import numpy.typing as npt
import xarray as xr

from calibrant.reproductions.found import Found

Bytes = npt.NDArray[np.uint8]


def as_bytes(dataset: xr.Dataset) -> Bytes:
    """A dataset as an array that a cell can return."""
    file = io.BytesIO()
    dataset.to_netcdf(file, engine="h5netcdf")
    return np.frombuffer(file.getvalue(), np.uint8).copy()


def from_bytes(array: Bytes) -> xr.Dataset:
    """The dataset of an array that `as_bytes` made."""
    return xr.load_dataset(io.BytesIO(np.ascontiguousarray(array).tobytes()), engine="h5netcdf")


def datasets_of(found: Found, name: str, rows: Iterable[str] | None = None) -> dict[str, xr.Dataset]:
    """The datasets of a name that cells of the first seed have, by row; None for all rows of the run."""
    arrays = {row: found.array(row, name) for row in (found.rows if rows is None else rows)}
    return {row: from_bytes(array) for row, array in arrays.items() if array is not None}

"""Datasets of xarray in the files of cells, for pictures: the bytes of a NetCDF file as an array."""

from __future__ import annotations

import io

import numpy as np
import numpy.typing as npt
import xarray as xr

Bytes = npt.NDArray[np.uint8]


def as_bytes(dataset: xr.Dataset) -> Bytes:
    """A dataset as an array that a cell can return."""
    file = io.BytesIO()
    dataset.to_netcdf(file, engine="h5netcdf")
    return np.frombuffer(file.getvalue(), np.uint8).copy()


def from_bytes(array: Bytes) -> xr.Dataset:
    """The dataset of an array that `as_bytes` made."""
    return xr.load_dataset(io.BytesIO(np.ascontiguousarray(array).tobytes()), engine="h5netcdf")

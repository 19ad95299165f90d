"""Numbers in any of the forms in which they are given."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import xarray as xr
from torch import Tensor

from calibrant.errors import DataError

Array = npt.NDArray[np.float64]
Given = Tensor | np.ndarray | xr.DataArray


def plain(values: Any, name: str = "values") -> np.ndarray:
    """A tensor, numpy array, xarray variable or list as an array of its own dtype; bfloat16 becomes float32.

    Raises:
        DataError: for what cannot be one array, such as a list of rows of different lengths.
    """
    try:
        if isinstance(values, Tensor):
            values = values.detach().cpu()
            values = values.float() if values.dtype == torch.bfloat16 else values
        return np.asarray(values)
    except (TypeError, ValueError, RuntimeError):
        raise DataError(f"{name}: this is no single array; give an array or tensor with rows of one length") from None


def numbers(values: Given, name: str = "values") -> Array:
    """A tensor, numpy array or xarray variable as an array in float64.

    Raises:
        DataError: for anything but real numbers or truth values.
    """
    found = plain(values, name)
    if found.dtype.kind not in "biuf":
        raise DataError(f"{name}: the type {found.dtype} has no real numbers; give floats, integers or truth values")
    return np.asarray(found, dtype=np.float64)

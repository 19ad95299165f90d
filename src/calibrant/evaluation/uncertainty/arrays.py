"""Numbers in any of the forms in which they are given."""

from __future__ import annotations

import numpy as np
import xarray as xr
from torch import Tensor

from calibrant.evaluation.uncertainty.moments import Array

Given = Tensor | np.ndarray | xr.DataArray


def numbers(values: Given) -> Array:
    """A tensor, numpy array or xarray variable as an array in float64."""
    return np.asarray(values.detach().cpu() if isinstance(values, Tensor) else values, dtype=np.float64)

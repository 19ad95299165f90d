"""Arrays and tensors of data: what is taken, rows of them, and the search for values that are not finite."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from calibrant.errors import DataError

Array = Tensor | np.ndarray
Index = slice | Sequence[int] | np.ndarray | Tensor

CHECKED_AT_ONCE = 2**22  # numbers searched for NaN at a time, which keeps the memory below some tens of MB


def checked_array(name: object, value: object) -> Array:
    """Check that a value is a tensor or array of real numbers with a leading dimension, and return it."""
    if not isinstance(name, str):
        raise DataError(f"a site or covariate is called {name!r}: names are strings")
    if isinstance(value, np.ma.MaskedArray):
        raise DataError(
            f"{name} is a masked array: give its values with a value inside the support in every masked entry, "
            f"{name}.filled(VALUE), and the mask as a covariate that the program takes, ~numpy.ma.getmaskarray({name})"
        )
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


def positions_of(index: Index, size: int) -> np.ndarray:
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


def take(value: Array, rows: np.ndarray) -> Tensor:
    """Copy rows of an array or tensor into a tensor, on the device that holds them."""
    if isinstance(value, Tensor):
        return value.index_select(0, torch.from_numpy(rows).to(value.device))  # three times as fast as value[rows]
    return tensor_of(value[rows])


def tensor_of(array: np.ndarray) -> Tensor:
    """A numpy array as a tensor; byte orders and widths that torch lacks are converted."""
    if array.dtype == np.longdouble:
        array = array.astype(np.float64)
    return torch.from_numpy(np.require(array, array.dtype.newbyteorder("="), ["C", "W"]))


def row_blocks(size: int, row_numbers: int) -> Iterator[np.ndarray]:
    """Blocks of consecutive rows, each with at most `CHECKED_AT_ONCE` numbers (or one row)."""
    step = max(1, CHECKED_AT_ONCE // max(1, row_numbers))
    for start in range(0, size, step):
        yield np.arange(start, min(size, start + step))


def first_nonfinite(value: Array) -> int | None:
    """The first row that holds NaN or infinity."""
    floating = value.dtype.is_floating_point if isinstance(value, Tensor) else value.dtype.kind == "f"
    if not floating:
        return None
    for rows in row_blocks(len(value), int(np.prod(value.shape[1:]))):
        block = value[rows[0] : rows[-1] + 1]  # no copy of a tensor, as `take` makes one
        finite = torch.isfinite(block if isinstance(block, Tensor) else tensor_of(block))
        if not finite.all():
            return int(rows[0] + (~finite.reshape(len(rows), -1).all(1)).nonzero()[0, 0])
    return None


def not_finite(name: str, label: object) -> str:
    return (
        f"{name} holds NaN or infinity, first at data index {label}: leave such data out (Data.subset), or give "
        "missing entries a value inside the support, and the program a mask as a covariate"
    )


def listed(names: Collection[str]) -> str:
    return ", ".join(map(str, names)) or "none"

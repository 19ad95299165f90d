"""Data in a user's own files: FILE.npy, FILE.npz, and FILE.py:function."""

import inspect
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from calibrant.data.dataset import Data, as_data
from calibrant.data.splits import SPLITS, random_splits
from calibrant.errors import CalibrantError, DataError
from calibrant.userfile import load_object


def load_arrays(path: Path, seed: int) -> dict[str, Data]:
    """Seeded 80/10/10 splits of a .npy file (key `x`, read from disk batch by batch) or a .npz file (its own keys).

    Raises:
        DataError: for a file that is missing or damaged, or that holds Python objects (never unpickled).
    """
    if not path.is_file():
        raise DataError(f"there is no file {path}")
    try:
        if path.suffix == ".npy":
            arrays = {"x": np.load(path, mmap_mode="r", allow_pickle=False)}
        else:
            with np.load(path, allow_pickle=False) as archive:
                arrays = dict(archive)
    except (ValueError, OSError, EOFError, zipfile.BadZipFile) as error:
        raise DataError(
            f"{path} cannot be read: it is damaged, or holds more than plain numbers; save arrays with numpy.save "
            "or numpy.savez"
        ) from error
    return random_splits(Data(arrays, name=path.stem), seed)


def load_function(path: Path, function_name: str, seed: int, options: Mapping[str, Any]) -> dict[str, Data]:
    """Import a user's file, call a function of it, and split the data that it returns unless they are split already.

    Errors that the function itself raises are not changed.

    Raises:
        DataError: for a missing file or function, a file that does not import, options that the function does not take,
            or a result that is neither a `Data`, nor a dict of arrays, nor a dict of the splits train, validation and
            test.
    """
    if not function_name:
        raise DataError(f"say which function of {path} returns the data: {path}:FUNCTION")
    label = f"{path}:{function_name}"
    try:
        function, _ = load_object(label)
    except CalibrantError as error:
        raise DataError(str(error)) from error
    if not callable(function):
        raise DataError(f"{label} is a {type(function).__name__}: name a function that returns the data")
    try:
        inspect.signature(function).bind(**options)
    except TypeError as error:
        raise DataError(f"{label} cannot be called with {dict(options) or 'no arguments'}: {error}") from error
    result = function(**options)
    if isinstance(result, Mapping) and not set(result) & set(SPLITS):
        result = as_data(result)
    if isinstance(result, Data):
        return random_splits(result, seed)
    return as_splits(result, label)


def as_splits(result: object, label: str) -> dict[str, Data]:
    """Check that the result of a data function is a dict of the three splits, and make a `Data` of each.

    Raises:
        DataError: for anything else; the message names the function by `label`.
    """
    wanted = f"return a dict of arrays, a Data, or a dict with the keys {', '.join(SPLITS)}"
    if not isinstance(result, Mapping):
        raise DataError(f"{label} returned a {type(result).__name__}: {wanted}")
    if set(result) != set(SPLITS):
        raise DataError(f"{label} returned a dict with the keys {', '.join(map(str, result)) or 'none'}: {wanted}")
    return {split: as_data(result[split]) for split in SPLITS}

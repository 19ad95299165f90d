"""Data in a user's own files: FILE.npy, FILE.npz, FILE.csv, FILE.parquet, and FILE.py:function."""

import inspect
import os
import traceback
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from torch.utils.data import DataLoader, Dataset

from calibrant.data.dataset import Data, as_data
from calibrant.data.splits import SPLITS, random_splits
from calibrant.data.tables import is_table
from calibrant.errors import CalibrantError, DataError
from calibrant.userfile import load_object


def load_arrays(path: Path, seed: int) -> dict[str, Data]:
    """Seeded 80/10/10 splits of a .npy file (key `x`, read from disk batch by batch) or a .npz file (its own keys).

    Raises:
        DataError: for a file that is missing or damaged, or that holds Python objects (never unpickled).
    """
    arrays = read_arrays(path)
    try:
        return random_splits(Data(arrays, name=path.stem), seed)
    except DataError as error:
        raise DataError(f"{path}: {error}") from error


def read_arrays(path: Path) -> dict[str, np.ndarray]:
    """The arrays of a .npy file (key `x`, read from disk batch by batch) or a .npz file (its own keys).

    Raises:
        DataError: for a file that is missing, damaged or empty, or that holds Python objects (never unpickled).
    """
    if not os.path.isfile(path):
        raise DataError(f"there is no file {path}")
    try:
        arrays = {"x": _memmap(path)} if path.suffix == ".npy" else _archive(path)
    except MemoryError as error:
        raise DataError(
            f"{path} does not fit into memory ({error}): save a .npy file, which stays on the disk"
        ) from error
    except Exception as error:  # a damaged file raises errors of any kind in zipfile, its decompressors and numpy
        raise DataError(
            f"{path} cannot be read: it is damaged, or holds more than plain numbers; save arrays with numpy.save "
            "or numpy.savez"
        ) from error
    if not arrays:
        raise DataError(f"{path} holds no array: save one with numpy.savez({path.name!r}, x=array)")
    return arrays


def _memmap(path: Path) -> np.ndarray:
    """The array of a .npy file, which stays on the disk."""
    array = np.load(path, mmap_mode="r", allow_pickle=False)
    if not isinstance(array, np.memmap):
        raise ValueError("it is no .npy file")
    if (size := path.stat().st_size) != array.offset + array.nbytes:
        raise ValueError(f"it has {size} bytes, but its header says {array.offset + array.nbytes}")
    return array


def _archive(path: Path) -> dict[str, np.ndarray]:
    """The arrays of a .npz file; every member is read to its end, where its checksum is compared."""
    arrays: dict[str, np.ndarray] = {}
    with zipfile.ZipFile(path) as archive:
        for member in archive.infolist():
            name = member.filename.removesuffix(".npy")
            if name == member.filename or name in arrays:
                raise ValueError(f"its member {member.filename!r} is no array of its own")
            with archive.open(member) as file:
                arrays[name] = np.lib.format.read_array(file, allow_pickle=False)
                if file.read(1):
                    raise ValueError(f"its member {member.filename!r} holds more than an array")
    return arrays


def load_table(path: Path, seed: int) -> dict[str, Data]:
    """Seeded 80/10/10 splits of a table, with a key for every column. A first column without a name is the index.

    Raises:
        DataError: for a file that is missing or damaged, and for columns that `as_data` refuses.
    """
    import pandas as pd  # type: ignore[import-untyped]  # xarray brings it

    if not path.is_file():
        raise DataError(f"there is no file {path}")
    try:
        frame = pd.read_csv(path) if path.suffix == ".csv" else pd.read_parquet(path)
    except ImportError as error:
        raise DataError(f"{path} takes a package that reads parquet: pip install pyarrow, or save a .csv") from error
    except Exception as error:  # a damaged file raises errors of any kind in pandas and its parsers
        raise DataError(f"{path} cannot be read as a table: {type(error).__name__}: {error}") from error
    if str(frame.columns[0]).startswith("Unnamed: 0"):
        frame = frame.set_index(frame.columns[0])
    try:
        return random_splits(Data(frame, name=path.stem), seed)
    except DataError as error:
        raise DataError(f"{path}: {error}") from error


def load_function(path: Path, function_name: str, seed: int, options: Mapping[str, Any]) -> dict[str, Data]:
    """Import a user's file, call a function of it, and split the data that it returns unless they are split already.

    Raises:
        DataError: for a missing file or function, a file that does not import, options that the function does not take,
            an error of the function's own (which is the cause of this one), or a result that is neither in a form that
            `as_data` takes, nor a dict of the splits train, validation and test.
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
    try:
        result = function(**options)
    except SystemExit as error:
        raise DataError(
            f"{label} calls sys.exit({error.code if error.code is not None else ''}) instead of returning data: let it "
            "return the data, or raise an error that says what is missing"
        ) from error
    except CalibrantError:
        raise
    except Exception as error:
        at = traceback.extract_tb(error.__traceback__)[-1]
        raise DataError(
            f"{label} raises {type(error).__name__}: {error} (in line {at.lineno} of {at.filename})"
        ) from error
    if isinstance(result, dict) and set(result) & set(SPLITS):
        return as_splits(result, label)
    if not isinstance(result, Data | Mapping | Dataset | DataLoader) and not is_table(result):
        return as_splits(result, label)
    try:
        return random_splits(as_data(result), seed)
    except DataError as error:
        raise DataError(f"{label}: {error}") from error


def as_splits(result: object, label: str) -> dict[str, Data]:
    """Check that the result of a data function is a dict of the three splits, and make a `Data` of each.

    Raises:
        DataError: for anything else; the message names the function by `label`.
    """
    wanted = f"return a dict of arrays, a table, a Dataset, a Data, or a dict with the keys {', '.join(SPLITS)}"
    if not isinstance(result, Mapping):
        raise DataError(f"{label} returned a {type(result).__name__}: {wanted}")
    if set(result) != set(SPLITS):
        raise DataError(f"{label} returned a dict with the keys {', '.join(map(str, result)) or 'none'}: {wanted}")
    return {split: as_data(result[split]) for split in SPLITS}

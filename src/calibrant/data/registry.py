"""The registry of data sets."""

import inspect
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from calibrant.data.dataset import Data
from calibrant.data.files import as_splits, load_arrays, load_function, load_table
from calibrant.data.image_folders import load_folder
from calibrant.data.splits import Splits
from calibrant.errors import DataError
from calibrant.registries import Case, Registry

Function = TypeVar("Function", bound=Callable[..., dict[str, Data]])


@dataclass(frozen=True)
class DataSet:
    """The description of a registered data set.

    Attributes:
        name: name that users give.
        description: description of the data, in one line.
        source: publication or package that the data come from.
        licence: licence of the data.
        function: function that loads the data set.
        folder: folder of its files below the data root, which must exist before the set can be loaded; empty for sets
            that come inside a package.
        or_folder: another folder below the data root, whose files serve as well; empty if there is none.
        downloads: whether `download=True` can download it.
        keys: key → event shape and dtype of its arrays, with the default options.
        cases: examples with other options and their event shapes, which the tests load too.
    """

    name: str
    description: str
    source: str
    licence: str
    function: Callable[..., dict[str, Data]]
    folder: str = ""
    or_folder: str = ""
    downloads: bool = False
    keys: Mapping[str, tuple[tuple[int, ...], str]] = field(default_factory=dict)
    cases: tuple[Case, ...] = ()

    @property
    def options(self) -> dict[str, Any]:
        """The options that `load` passes on, with their defaults."""
        return {
            name: parameter.default
            for name, parameter in inspect.signature(self.function).parameters.items()
            if name not in ("root", "download", "seed") and parameter.kind is not inspect.Parameter.VAR_KEYWORD
        }

    def state(self, root: str | Path | None = None) -> str:
        """`ready`, `to download` (download=True, --download) or `absent` (to be put into the folder by hand)."""
        folders = [folder for folder in (self.folder, self.or_folder) if folder]
        if not folders or any((data_root(root) / folder).exists() for folder in folders):
            return "ready"
        return "to download" if self.downloads else "absent"


DATA_SETS: Registry[DataSet] = Registry(
    "data set", DataError, "Files: FILE.npz, FILE.npy, FILE.csv, FOLDER/ or FILE.py:function"
)


def register_data(
    name: str,
    *,
    description: str,
    source: str,
    licence: str,
    folder: str = "",
    or_folder: str = "",
    downloads: bool = False,
    keys: Mapping[str, tuple[tuple[int, ...], str]] | None = None,
    cases: tuple[Case, ...] = (),
) -> Callable[[Function], Function]:
    """Register `function(root: Path, download: bool, **options)`, which returns the splits train, validation and test.

    An option called `seed` gets the seed of `load`. The arguments are the attributes of `DataSet`.

    Raises:
        DataError: for a name that another function has.
    """

    def register(function: Function) -> Function:
        card = DataSet(name, description, source, licence, function, folder, or_folder, downloads, keys or {}, cases)
        DATA_SETS.add(name, card, function)
        return function

    return register


def list_data(pattern: str = "*") -> list[DataSet]:
    """Registered data sets whose names match a shell pattern, sorted by name; `.state(root)` tells which are ready."""
    return [DATA_SETS[name] for name in DATA_SETS.names(pattern)]


def data_root(root: str | Path | None = None) -> Path:
    """The folder of data files: `root`, else the environment variable CALIBRANT_DATA, else ~/.cache/calibrant."""
    return Path(root or os.environ.get("CALIBRANT_DATA") or "~/.cache/calibrant").expanduser()


def load(
    name_or_path: str | Path, root: str | Path | None = None, download: bool = False, seed: int = 0, **options: Any
) -> dict[str, Data]:
    """Load a data set as the splits `train`, `validation` and `test`.

    Args:
        name_or_path: a registered name; FILE.npy (read as `x`) or FILE.npz; FILE.csv or FILE.parquet, with a key for
            every column; FOLDER/ with photographs CLASS/NAME.jpg, .jpeg or .png, of which the middle square is resized,
            and which are read when they are needed; or FILE.py:function, a function that returns data in any form that
            `as_data` takes, or a dict of the three splits. Data without splits are split 80/10/10 at random. Only
            FILE.py:function imports a file, and arrays are read without unpickling.
        root: folder of the files of registered sets, see `data_root`.
        download: whether to download a registered set that is missing.
        seed: random seed for the split, and for other random choices of the data set.
        options: options of the registered set or of the function, such as `size=12` for natural-patches. Sets of 8-bit
            images take `size` (a number of pixels, or height and width; None keeps the stored size) and `values`:
            "unit" for grey values k as k/255, "dequantised" for (k + u)/256 with one uniform number u for each pixel,
            "binarised" for one draw of 0 or 1 with probability k/255, or "thresholded" for 1 where k is 128 or more.
            Sets of photographs by class take `classes`: "all" for a split of every class, "apart" for test classes
            (the second half, in sorted order) of which nothing is in the other splits, "train" or "test" for a split of
            these classes alone.

    Raises:
        DataError: for an unknown name, missing files, unknown options, or a function with a wrong result.
    """
    return Splits(_load(str(name_or_path), root, download, seed, options))


def _load(text: str, root: str | Path | None, download: bool, seed: int, options: dict[str, Any]) -> dict[str, Data]:
    file, _, function = text.rpartition(":") if ".py:" in text else (text, "", "")
    path = Path(file).expanduser()
    if path.suffix == ".py":
        return load_function(path, function, seed, options)
    if path.suffix in (".npy", ".npz"):
        if options:
            raise DataError(f"{path} takes no options, but got {', '.join(options)}")
        return load_arrays(path, seed)
    if path.suffix in (".csv", ".parquet"):
        if options:
            raise DataError(f"{path} takes no options, but got {', '.join(options)}")
        return load_table(path, seed)
    if text.endswith("/") or (text not in DATA_SETS and path.is_dir()):
        return load_folder(path, seed, options)
    return _load_registered(DATA_SETS[text], data_root(root), download, seed, options)


def _load_registered(entry: DataSet, root: Path, download: bool, seed: int, options: dict[str, Any]) -> dict[str, Data]:
    parameters = inspect.signature(entry.function).parameters
    if "seed" in parameters:
        options = {"seed": seed, **options}
    unknown = [name for name in options if name not in parameters]
    open_ended = any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values())
    if unknown and not open_ended:
        has = f"its options are {', '.join(entry.options)}" if entry.options else "it has none"
        raise DataError(f"{entry.name} has no option {', '.join(map(repr, unknown))}: {has}")
    return as_splits(entry.function(root=root, download=download, **options), entry.name)

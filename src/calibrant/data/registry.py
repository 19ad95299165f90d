"""Data sets by name."""

import inspect
import os
from collections.abc import Callable
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, TypeVar

from calibrant.data.dataset import Data
from calibrant.data.files import as_splits, load_arrays, load_function
from calibrant.errors import DataError, names_to_offer

Function = TypeVar("Function", bound=Callable[..., dict[str, Data]])


@dataclass(frozen=True)
class DataSet:
    """A registered data set: what it is, where it comes from, under which licence, and how it is loaded.

    `folder`, relative to the data root, must exist before the set can be loaded; it is empty for embedded sets.
    `downloads` says whether `download=True` can bring it.
    """

    name: str
    description: str
    source: str
    licence: str
    function: Callable[..., dict[str, Data]]
    folder: str = ""
    downloads: bool = False

    def state(self, root: str | Path | None = None) -> str:
        """`ready`, `to download` (download=True, --download) or `absent` (to be put into the folder by hand)."""
        if not self.folder or (data_root(root) / self.folder).exists():
            return "ready"
        return "to download" if self.downloads else "absent"


_REGISTRY: dict[str, DataSet] = {}


def register_data(
    name: str, *, description: str, source: str, licence: str, folder: str = "", downloads: bool = False
) -> Callable[[Function], Function]:
    """Register `function(root: Path, download: bool, **options)`, which returns the splits train, validation and test.

    An option called `seed` gets the seed of `load`. The other arguments are those of `DataSet`.

    Raises:
        DataError: for a name that another function has.
    """

    def register(function: Function) -> Function:
        known = _REGISTRY.get(name)
        if known is not None and _origin(known.function) != _origin(function):
            raise DataError(f"a data set {name!r} is registered already, by {'.'.join(_origin(known.function))}")
        _REGISTRY[name] = DataSet(name, description, source, licence, function, folder, downloads)
        return function

    return register


def list_data(pattern: str = "*") -> list[DataSet]:
    """Registered data sets whose names match a shell pattern, sorted by name; `.state(root)` tells which are ready."""
    return [_REGISTRY[name] for name in sorted(_REGISTRY) if fnmatchcase(name, pattern)]


def data_root(root: str | Path | None = None) -> Path:
    """Where files of data sets are: `root`, else the environment's CALIBRANT_DATA, else ~/.cache/calibrant."""
    return Path(root or os.environ.get("CALIBRANT_DATA") or "~/.cache/calibrant").expanduser()


def load(
    name_or_path: str | Path, root: str | Path | None = None, download: bool = False, seed: int = 0, **options: Any
) -> dict[str, Data]:
    """A data set as the splits `train`, `validation` and `test`.

    Args:
        name_or_path: a registered name; FILE.npy (read as `x`) or FILE.npz; or FILE.py:function, a function that
            returns a `Data` or a dict of the three splits. What is not split is split 80/10/10 at random. Only the last
            form imports a file, and arrays are read without unpickling.
        root: folder of the files of registered sets, see `data_root`.
        download: fetch a registered set that is not there.
        seed: of the random split, and of whatever else is random in the set.
        options: of the registered set or the function, such as `size=12` for natural-patches.

    Raises:
        DataError: for an unknown name, missing files, options that the set lacks, or a function with a wrong result.
    """
    text = str(name_or_path)
    if text in _REGISTRY:
        return _load_registered(_REGISTRY[text], data_root(root), download, seed, options)
    file, _, function = text.rpartition(":") if ".py:" in text else (text, "", "")
    path = Path(file).expanduser()
    if path.suffix == ".py":
        return load_function(path, function, seed, options)
    if path.suffix in (".npy", ".npz"):
        if options:
            raise DataError(f"{path} takes no options, but got {', '.join(options)}")
        return load_arrays(path, seed)
    raise DataError(_unknown(text))


def _load_registered(entry: DataSet, root: Path, download: bool, seed: int, options: dict[str, Any]) -> dict[str, Data]:
    parameters = inspect.signature(entry.function).parameters
    if "seed" in parameters:
        options = {"seed": seed, **options}
    allowed = [name for name in parameters if name not in ("root", "download", "seed")]
    unknown = [name for name in options if name not in parameters]
    open_ended = any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values())
    if unknown and not open_ended:
        has = f"its options are {', '.join(allowed)}" if allowed else "it has none"
        raise DataError(f"{entry.name} has no option {', '.join(map(repr, unknown))}: {has}")
    return as_splits(entry.function(root=root, download=download, **options), entry.name)


def _unknown(name: str) -> str:
    hint = names_to_offer(name, _REGISTRY)
    return f"there is no data set {name!r}; {hint} Files: FILE.npz, FILE.npy or FILE.py:function"


def _origin(function: Callable[..., Any]) -> tuple[str, str]:
    """Module and qualified name: the same for a function that a reload or a notebook cell defines anew."""
    return function.__module__, function.__qualname__

"""`config.json`, which says which model, guide, data and settings a run folder belongs to."""

from __future__ import annotations

import json
import math
import platform
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

from calibrant._version import __version__
from calibrant.errors import RunError
from calibrant.folders.files import new_file

FORMAT = "calibrant/1"
CONFIG = "config.json"
_LIBRARIES = ("torch", "pyro-ppl", "numpy", "xarray", "arviz-base", "arviz-stats", "safetensors", "h5netcdf")


def versions() -> dict[str, str]:
    """Versions of calibrant, Python and the libraries that results depend on."""
    found = {name: version(name) for name in _LIBRARIES}
    return {"calibrant": __version__, "python": platform.python_version(), **found}


def write_config(folder: Path, config: dict[str, Any]) -> None:
    """Write `config.json`; NaN and infinities, which JSON lacks, become null.

    Raises:
        RunError: for values that JSON cannot hold.
    """
    try:
        text = json.dumps(_finite(config), indent=2, ensure_ascii=False, allow_nan=False)
    except TypeError as error:
        raise RunError(f"{CONFIG} can hold JSON values only: {error}") from error
    with new_file(folder / CONFIG) as new:
        new.write_text(text + "\n", encoding="utf-8")


def read_config(run_dir: str | Path) -> dict[str, Any]:
    """Read `config.json` of a folder with one run.

    Raises:
        RunError: for a folder that is missing, not a run folder, damaged, of another format, or holds several runs.
    """
    folder = Path(run_dir)
    config = read_any_config(folder)
    if "runs" in config:
        each = ", ".join(str(folder / name) for name in config["runs"])
        raise RunError(f"{folder} holds several runs, name one of them: {each}")
    if missing := sorted({"name", "model", "guide", "data", "settings", "fit", "sha256"} - set(config)):
        raise RunError(f"{folder} is damaged: {CONFIG} lacks {missing}; copy the folder again")
    if config["fit"] is not None:
        config["fit"] = {name: math.nan if value is None else value for name, value in config["fit"].items()}
    return config


def read_any_config(folder: Path) -> dict[str, Any]:
    """Read `config.json` of a folder with one run, or with several (which have the key `runs`)."""
    path = folder / CONFIG
    if not folder.is_dir():
        raise RunError(f"there is no run in {folder}: give a run folder; `calibrant run --out {folder}` creates one")
    if not path.is_file():
        raise RunError(f"{folder} is no run folder of calibrant: it has no {CONFIG}")
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise RunError(f"{folder} is damaged: {CONFIG} cannot be read ({error}); copy the folder again") from error
    written = config.get("format") if isinstance(config, dict) else None
    if not isinstance(written, str) or not written.startswith("calibrant/"):
        raise RunError(f"{folder} is no run folder of calibrant: {path} was written by another program")
    if written != FORMAT:
        raise RunError(
            f"{folder} has the format {written}, this version of calibrant reads {FORMAT}: use another version"
        )
    return config


def _finite(value: Any) -> Any:
    """The same JSON value, with None in place of numbers that are not finite."""
    if isinstance(value, Mapping):
        return {str(key): _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value

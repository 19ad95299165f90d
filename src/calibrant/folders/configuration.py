"""`config.json`, which says which model, guide, data and settings a run folder belongs to, and what its files hold.

It records the sha256 of every file of the folder that is read again, and one of its own content. A file is written
under a temporary name, its sha256 is recorded, and then it gets its name. If a process is killed in between, the old
file no longer fits its record, and the result is computed again.
"""

from __future__ import annotations

import json
import math
import platform
from collections.abc import Iterable, Mapping
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from calibrant._version import __version__
from calibrant.errors import RunError
from calibrant.folders.files import digest, new_file
from calibrant.folders.schema import first_fault

FORMAT = "calibrant/2"
UNRECORDED = "calibrant/1"  # the format of versions that recorded the sha256 of the weights alone
CONFIG = "config.json"
REPRODUCTION = "reproduction"  # the key of a folder with a reproduction of a paper
_LIBRARIES = ("torch", "pyro-ppl", "numpy", "xarray", "arviz-base", "arviz-stats", "safetensors", "h5netcdf")
_KEYS = ("name", "model", "guide", "data", "settings", "fit", "sha256")  # of a folder with one run


def versions() -> dict[str, str]:
    """Versions of calibrant, Python and the libraries that results depend on."""
    found = {name: version(name) for name in _LIBRARIES}
    return {"calibrant": __version__, "python": platform.python_version(), **found}


def versions_of(packages: Iterable[str]) -> dict[str, str]:
    """Versions of those of some packages that are installed."""
    found = {}
    for name in packages:
        with suppress(PackageNotFoundError):
            found[name] = version(name)
    return found


def write_config(folder: Path, config: Mapping[str, Any]) -> None:
    """Write `config.json` with its own sha256; NaN and infinities, which JSON lacks, become null.

    Raises:
        RunError: for values that JSON cannot hold.
    """
    try:
        content = finite(config)
        content["sha256"] = {**content.get("sha256", {}), CONFIG: _own_digest(content)}
        text = json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False).encode()
    except (TypeError, ValueError, RecursionError) as error:
        raise RunError(f"{CONFIG} can hold JSON values only: {error}") from error
    with new_file(folder / CONFIG) as new:
        new.write_bytes(text + b"\n")


def read_config(run_dir: str | Path) -> dict[str, Any]:
    """Read `config.json` of a folder with one run.

    Raises:
        RunError: for a folder that is missing, not a run folder, damaged, of another format, or holds several runs.
    """
    folder = Path(run_dir)
    config = read_any_config(folder)
    if "runs" in config:
        each = ", ".join(map(str, members(folder, config)))
        raise RunError(f"{folder} holds several runs, name one of them: {each}")
    if REPRODUCTION in config:
        raise RunError(
            f"{folder} holds a reproduction of {config[REPRODUCTION].get('paper')}, which calibrant reproduce writes: "
            "open its report.html"
        )
    if missing := sorted(set(_KEYS) - set(config)):
        raise RunError(f"{folder} is damaged: {CONFIG} lacks {missing}; copy the folder again")
    if config["fit"] is not None:
        config["fit"] = {name: math.nan if value is None else value for name, value in config["fit"].items()}
    return config


def read_any_config(folder: Path) -> dict[str, Any]:
    """Read `config.json` of a folder with one run, or with several (which have the key `runs`), and verify it.

    Its own sha256 is left out of the result.
    """
    path = folder / CONFIG
    if not folder.is_dir():
        raise RunError(f"there is no run in {folder}: give a run folder; `calibrant run --out {folder}` creates one")
    if not path.is_file():
        raise RunError(
            f"{folder} is no run folder of calibrant: it has no {CONFIG}; give a folder that `calibrant run` or "
            "`calibrant.save` has written"
        )
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise RunError(f"{folder} is damaged: {CONFIG} cannot be read ({error}); copy the folder again") from error
    written = config.get("format") if isinstance(config, dict) else None
    if not isinstance(written, str) or not written.startswith("calibrant/"):
        raise RunError(f"{folder} is no run folder of calibrant: {path} was written by another program")
    if written not in (FORMAT, UNRECORDED):
        raise RunError(
            f"{folder} has the format {written[:40]}, this version of calibrant reads {UNRECORDED} and {FORMAT}: use a "
            "newer version of calibrant"
        )
    return _verified(folder, config)


def _verified(folder: Path, config: dict[str, Any]) -> dict[str, Any]:
    """The configuration without its own sha256, if that is right and all values have the right kinds."""
    fault = first_fault(config)
    if fault is not None:
        raise RunError(f"{folder} is damaged: in {CONFIG} {fault}; copy the folder again")
    recorded = dict(config.get("sha256", {}))
    own = recorded.pop(CONFIG, None)
    if own is None and config["format"] == FORMAT:
        raise RunError(f"{folder} is damaged: {CONFIG} lacks its own sha256; copy the folder again")
    config = {**config, "sha256": recorded}
    if own is not None and own != _own_digest(config):
        raise RunError(
            f"{folder} is damaged: {CONFIG} was changed after it was written, its sha256 is another one; copy the "
            "folder again"
        )
    return config


def members(folder: Path, config: Mapping[str, Any]) -> list[Path]:
    """The folders of a folder with several runs, each of which lies directly inside it.

    Raises:
        RunError: for a name that leads out of the folder, and for a link.
    """
    for name in config["runs"]:
        if name in ("", ".", "..") or Path(name).name != name or "\0" in name:
            raise RunError(f"{folder} is damaged: {CONFIG} names the run {name!r}, which is no folder inside it")
        if (folder / name).is_symlink():
            raise RunError(f"{folder / name} is a link: calibrant stays inside {folder}, so put the run itself there")
    return [folder / name for name in config["runs"]]


def _own_digest(config: Mapping[str, Any]) -> str:
    """The sha256 of the values of a configuration, however the text is laid out."""
    files = {name: value for name, value in config.get("sha256", {}).items() if name != CONFIG}
    return digest(json.dumps({**config, "sha256": files}, sort_keys=True, separators=(",", ":")).encode())


def finite(value: Any) -> Any:
    """The same JSON value, with None in place of numbers that are not finite."""
    if isinstance(value, Mapping):
        return {str(key): finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value

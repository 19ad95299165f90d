"""The sha256 that `config.json` records for every file of a run folder that is read again."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from calibrant.errors import RunError
from calibrant.folders.configuration import CONFIG, UNRECORDED, read_any_config, write_config
from calibrant.folders.files import digest_of_file


def record(path: Path, sha256: str) -> None:
    """Record the sha256 of a file that is about to get this name; nothing is done outside of run folders."""
    config = _beside(path)
    if config is not None:
        config["sha256"][path.name] = sha256
        write_config(path.parent, config)


def is_as_recorded(path: Path) -> bool:
    """Whether a file of a run folder is recorded, and still is what was written."""
    config = _beside(path)
    wanted = None if config is None else config["sha256"].get(path.name)
    return wanted is not None and wanted == digest_of_file(path)


def check_unchanged(path: Path, remedy: str) -> None:
    """Compare a file with its record; a file without a record, such as one outside of run folders, is not compared.

    Raises:
        RunError: for a file that is not the one that was written; the message says what to do: `remedy`.
    """
    config = _beside(path)
    wanted = None if config is None else config["sha256"].get(path.name)
    if wanted is not None and wanted != digest_of_file(path):
        raise RunError(f"{path} is damaged: its sha256 is not the one in {CONFIG}; {remedy}")


def check_recorded(path: Path, config: dict[str, Any], remedy: str) -> None:
    """Check that the configuration of a run records a file of its folder; versions that recorded none are excused.

    Raises:
        RunError: for a file that is not recorded; the message says what to do: `remedy`.
    """
    if path.name not in config["sha256"] and config["format"] != UNRECORDED:
        raise RunError(f"{path} was not written for this run, since {CONFIG} has no sha256 of it; {remedy}")


def _beside(path: Path) -> dict[str, Any] | None:
    """The configuration of the run folder in which a file lies; None if it lies in another folder."""
    try:
        return read_any_config(path.parent)
    except RunError:
        return None

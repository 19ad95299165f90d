"""Files that are never left half written, and digests of their content."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def digest(content: bytes) -> str:
    """The sha256 of some bytes, 64 hexadecimal digits."""
    return hashlib.sha256(content).hexdigest()


def digest_of_file(path: Path) -> str:
    """The sha256 of a file, which is read once, in blocks."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextmanager
def new_file(path: Path, synced: bool = True) -> Iterator[Path]:
    """A temporary name to write to; the file is renamed to `path` at the end, and deleted on an error.

    Args:
        path: name of the file.
        synced: whether the content is on the disk before the file is renamed, so that `path` is whole even after a
            power cut.
    """
    new = path.with_name(f".{path.name}.{os.getpid()}.new")
    try:
        yield new
        if synced:
            _sync(new)
        os.replace(new, path)
    finally:
        new.unlink(missing_ok=True)


def left_over(path: Path) -> list[Path]:
    """Temporary files of `path` that a killed process has left."""
    return [
        file for file in path.parent.glob("*.new") if file.name.startswith(f".{path.name}.") and not file.is_symlink()
    ]


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDWR)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)

"""Files that are never left half written, and digests of their content."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


@contextmanager
def new_file(path: Path) -> Iterator[Path]:
    """A temporary name to write to; the file is renamed to `path` at the end, and deleted on an error."""
    new = path.with_name(f".{path.name}.{os.getpid()}.new")
    try:
        yield new
        os.replace(new, path)
    finally:
        new.unlink(missing_ok=True)

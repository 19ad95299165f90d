"""Objects in a user's own file, named `FILE.py:name`. A file is imported only if the user names it."""

from __future__ import annotations

import hashlib
import importlib.util
import sys
from pathlib import Path
from typing import Any

from calibrant.errors import CalibrantError


def is_user_spec(text: str) -> bool:
    """Whether a name has the form `FILE.py:name`."""
    return ".py:" in text


def load_object(spec: str) -> tuple[Any, str]:
    """Load the object that `FILE.py:name` names; returns the object and the sha256 of the file.

    Raises:
        CalibrantError: for a missing file or name, or a file that cannot be imported.
    """
    file, _, name = spec.rpartition(":")
    path = Path(file).expanduser()
    if not path.is_file():
        raise CalibrantError(f"there is no file {file}")
    module_name = f"calibrant_user_{path.stem}"
    module_spec = importlib.util.spec_from_file_location(module_name, path)
    assert module_spec is not None
    assert module_spec.loader is not None
    module = importlib.util.module_from_spec(module_spec)
    sys.modules[module_name] = module
    try:
        module_spec.loader.exec_module(module)
    except Exception as error:
        raise CalibrantError(f"{file} does not import: {type(error).__name__}: {error}") from error
    except SystemExit as error:
        raise CalibrantError(
            f'{file} calls sys.exit when it is imported: put what it does as a script under if __name__ == "__main__":'
        ) from error
    if not hasattr(module, name):
        own = [n for n, thing in vars(module).items() if getattr(thing, "__module__", "") == module_name]
        raise CalibrantError(f"{file} has no {name!r}; it defines {', '.join(own) or 'nothing'}")
    return getattr(module, name), hashlib.sha256(path.read_bytes()).hexdigest()

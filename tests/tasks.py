"""Tasks for the tests of processes; each process imports this file, so that it imports nothing heavy itself."""

from __future__ import annotations

import os
import signal
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

Progress = Callable[..., Any]


class Unlucky(UserWarning):
    """A warning of a user's own."""


def reporting(path: Path, progress: Progress) -> str:
    progress("stage", sys.modules["torch"].get_num_threads(), 2, path.name)
    path.write_text("done")
    return path.name


def failing_or_waiting(path: Path, progress: Progress) -> None:
    if path.name == "fails":
        while not path.with_name("waits").exists():
            time.sleep(0.05)
        from calibrant.errors import RunError

        warnings.warn("luck runs out", Unlucky, stacklevel=1)
        raise RunError("no luck")
    wait_for_an_interrupt(path, progress)


def wait_for_an_interrupt(path: Path, progress: Progress) -> None:
    path.write_text("waiting")
    progress("wait", 0, 1)
    try:
        time.sleep(60)
    except KeyboardInterrupt:
        path.write_text("kept")
        raise


def dying(path: Path, progress: Progress) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def waiting_for_ever(path: Path, progress: Progress) -> None:
    path.write_text(str(os.getpid()))
    time.sleep(600)

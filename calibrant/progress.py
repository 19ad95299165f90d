"""Progress of long calls: a function `(stage, done, total, text)` that the command line draws as bars."""

from __future__ import annotations

from typing import Protocol


class Progress(Protocol):
    """Called after every part of a stage; `text` says how it goes."""

    def __call__(self, stage: str, done: int, total: int, text: str = "") -> None: ...


def silent(stage: str, done: int, total: int, text: str = "") -> None:
    """No progress shown."""

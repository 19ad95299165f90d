"""Progress of long calls, reported to a function `(stage, done, total, text)`; by default as bars in a terminal."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Protocol

from calibrant.displays import Lines, Notebook, Terminal, shown_on
from calibrant.errors import CalibrantError

_SOON = 1.0  # seconds after which a call from Python is shown


class Progress(Protocol):
    """A function that is called after every part of a stage; `text` is a remark, such as the current loss.

    A stage that is reported as 0 of 1, and then as 1 of 1, has no count.
    """

    def __call__(self, stage: str, done: int, total: int, text: str = "") -> None: ...


def silent(stage: str, done: int, total: int, text: str = "") -> None:
    """Show no progress."""


def reporting(progress: Progress | bool) -> Progress:
    """The function in an argument `progress` of a public function.

    A facade has already put a function in the place of a bool (`calls.own_call`). A bool is left where the package
    itself calls a public function without this argument; nothing is shown then.
    """
    return silent if isinstance(progress, bool) else progress


def remarking(progress: Progress) -> Progress:
    """Report to a function of the user, which is always given all four arguments."""

    def show(stage: str, done: int, total: int, text: str = "") -> None:
        progress(stage, done, total, text)

    return show


def prefixed(progress: Progress, prefix: str) -> Progress:
    """Report to the same function, with a prefix before the name of each stage."""

    def show(stage: str, done: int, total: int, text: str = "") -> None:
        progress(f"{prefix} {stage}", done, total, text)

    return show


@contextmanager
def bars(quiet: bool = False) -> Iterator[Progress]:
    """Show progress on standard error: bars on a terminal, otherwise a line when a stage begins, every few seconds, and
    when it ends.

    Args:
        quiet: show nothing.
    """
    if quiet:
        yield silent
        return
    with shown_on(Terminal() if _is_terminal() else Lines()) as progress:
        yield progress


@contextmanager
def displayed(progress: Any) -> Iterator[Progress]:
    """The function that a user's call reports to, for its argument `progress: Progress | bool`.

    True shows bars in a notebook, or on standard error if that is a terminal, once the call has taken a second. It
    shows nothing elsewhere, so that the output of scripts is theirs alone.

    Raises:
        CalibrantError: for an argument that is neither a function nor a bool.
    """
    if callable(progress):
        yield progress
    elif not isinstance(progress, bool):
        raise CalibrantError(
            f"progress={progress!r}: give True (bars), False (nothing), or a function that is called with (stage, "
            "done, total, text)"
        )
    elif progress and (_is_notebook() or _is_terminal()):
        with shown_on(Notebook() if _is_notebook() else Terminal(), _SOON) as function:
            yield function
    else:
        yield silent


def _is_notebook() -> bool:
    shell = getattr(sys.modules.get("IPython"), "get_ipython", lambda: None)()
    return hasattr(shell, "kernel")


def _is_terminal() -> bool:
    """Whether standard error is a terminal whose lines can be written anew."""
    return sys.stderr is not None and sys.stderr.isatty() and os.environ.get("TERM") not in ("dumb", "unknown")

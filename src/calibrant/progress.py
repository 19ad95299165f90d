"""Progress of long calls, reported to a function `(stage, done, total, text)`; the command line shows bars."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import IO, Protocol

_PAUSE = 10.0  # seconds between two plain lines of a stage


class Progress(Protocol):
    """A function that is called after every part of a stage; `text` is a remark, such as the current loss."""

    def __call__(self, stage: str, done: int, total: int, text: str = "") -> None: ...


def silent(stage: str, done: int, total: int, text: str = "") -> None:
    """Show no progress."""


def prefixed(progress: Progress, prefix: str) -> Progress:
    """Report to the same function, with a prefix before the name of each stage."""

    def show(stage: str, done: int, total: int, text: str = "") -> None:
        progress(f"{prefix} {stage}", done, total, text)

    return show


@contextmanager
def bars(quiet: bool = False) -> Iterator[Progress]:
    """Show progress on standard error: a bar per stage on a terminal, otherwise a line every few seconds.

    Args:
        quiet: show nothing.
    """
    if quiet:
        yield silent
        return
    from rich.console import Console

    console = Console(stderr=True)
    if not console.is_terminal:
        yield _lines(console.file)
        return
    from rich import progress as rich

    columns = (
        rich.TextColumn("{task.description}", markup=False),
        rich.BarColumn(bar_width=24),
        rich.MofNCompleteColumn(),
        rich.TimeElapsedColumn(),
        rich.TextColumn("{task.fields[text]}", markup=False),
    )
    with rich.Progress(*columns, console=console) as shown:
        tasks: dict[str, rich.TaskID] = {}

        def show(stage: str, done: int, total: int, text: str = "") -> None:
            if stage not in tasks:
                tasks[stage] = shown.add_task(stage, text=text)
            shown.update(tasks[stage], completed=done, total=total, text=text)

        yield show


def _lines(file: IO[str]) -> Progress:
    last: dict[str, float] = {}

    def show(stage: str, done: int, total: int, text: str = "") -> None:
        if done < total and time.monotonic() - last.setdefault(stage, time.monotonic()) < _PAUSE:
            return
        last[stage] = time.monotonic()
        print(f"{stage}: {done}/{total} {text}".rstrip(), file=file, flush=True)

    return show

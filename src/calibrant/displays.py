"""Where progress is shown: a terminal, whose last lines change; plain lines, for a file; a cell of a notebook."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Protocol

from calibrant.stages import Line, Stage, Stages, clock, plain_line, stage_lines

_PAUSE = 10.0  # seconds between two plain lines of a stage
_PER_SECOND = 10  # pictures in a terminal
_ECHO = 3  # columns left free for the "^C" that a terminal writes behind the cursor
_SELDOM = 0.3  # seconds between two pictures in a notebook
_COLUMNS = 100  # of a notebook


class Display(Protocol):
    """Shows stages, from `open` until `close`."""

    def open(self, stages: Stages) -> None: ...

    def update(self, over: list[Stage]) -> None:
        """Show what was reported; `over` are stages that are no longer among those shown."""

    def close(self) -> None: ...


class _Reports:
    """A function that takes reports, for a display that opens some seconds after the first one, or never."""

    def __init__(self, display: Display, seconds: float) -> None:
        self.display, self.stages, self.over = display, Stages(), list[Stage]()
        self.lock, self.is_open, self.is_closed = threading.Lock(), False, False
        self.timer = threading.Timer(seconds, self.open)
        self.timer.daemon = True
        if not seconds:
            self.open()

    def __call__(self, stage: str, done: int, total: int, text: str = "") -> None:
        with self.lock:
            self.over += self.stages.report(stage, done, total, text)
            if self.is_open:
                self._update()
            elif self.timer.ident is None:
                self.timer.start()

    def open(self) -> None:
        with self.lock:
            if not self.is_closed:
                self.is_open = True
                self.display.open(self.stages)
                self._update()

    def _update(self) -> None:
        self.display.update(self.over)
        self.over.clear()

    def close(self) -> None:
        with self.lock:
            self.is_closed = True
            self.timer.cancel()
            if self.is_open:
                self.display.close()


@contextmanager
def shown_on(display: Display, seconds: float = 0.0) -> Iterator[_Reports]:
    """A function `(stage, done, total, text)` whose reports are shown until the end of the context.

    Args:
        display: where they are shown.
        seconds: how long after the first report the display opens; what ends before shows nothing.
    """
    reports = _Reports(display, seconds)
    try:
        yield reports
    finally:
        reports.close()


class Terminal:
    """Standard error, whose last lines are the running stages; each finished stage leaves a line above them."""

    def open(self, stages: Stages) -> None:
        from rich.console import Console
        from rich.live import Live

        self.stages = stages
        self.console = Console(file=sys.stderr, force_terminal=True, highlight=False)
        # What is printed goes above the stages if it goes to this terminal, and where it went before if not.
        printed = sys.stdout is not None and sys.stdout.isatty()
        self.live = Live(
            self, console=self.console, refresh_per_second=_PER_SECOND, transient=True, redirect_stdout=printed
        )
        self.live.start()

    def __rich__(self) -> Any:
        from rich.console import Group

        return Group(*(self._text(line) for line in self.stages.lines(self._width() - _ECHO, self._unicode())))

    def update(self, over: list[Stage]) -> None:
        for stage in over:
            self._print(stage)

    def close(self) -> None:
        self.live.stop()
        for stage in self.stages.shown.values():
            self._print(stage)

    def _print(self, stage: Stage) -> None:
        for line in stage_lines(stage, self._width(), self._unicode(), stopped=True):
            self.console.print(self._text(line))

    def _width(self) -> int:
        return self.console.width

    def _unicode(self) -> bool:
        return self.console.encoding.startswith("utf")

    @staticmethod
    def _text(line: Line) -> Any:
        from rich.text import Text

        return Text.assemble(*line, no_wrap=True, overflow="crop")


class Lines:
    """Standard error as a file: a line when a stage begins, one every ten seconds, and one when all of it is done."""

    def __init__(self) -> None:
        self.told: dict[str, float] = {}  # stage → when its last line was printed

    def open(self, stages: Stages) -> None:
        self.stages, self.file = stages, sys.stderr

    def update(self, over: list[Stage]) -> None:
        for ended in over:
            self.told.pop(ended.name, None)
        stage = self.stages.latest
        waited = stage is not None and stage.last - self.told.get(stage.name, -_PAUSE) >= _PAUSE
        if stage is None or not (waited or (stage.is_finished and stage.count)):
            return
        self.told[stage.name] = stage.last
        print(plain_line(stage), file=self.file, flush=True)

    def close(self) -> None: ...


class Notebook:
    """The output of a cell, which changes while the call runs; a line about the whole call stays."""

    def __init__(self) -> None:
        self.over, self.shown_at = list[Stage](), 0.0

    def open(self, stages: Stages) -> None:
        from IPython.display import display

        self.stages = stages
        self.handle = display({"text/plain": ""}, raw=True, display_id=True)

    def update(self, over: list[Stage]) -> None:
        self.over += over
        if over or time.monotonic() - self.shown_at >= _SELDOM:
            self.shown_at = time.monotonic()
            finished = [line for stage in self.over for line in stage_lines(stage, _COLUMNS)]
            self._show([*finished, *self.stages.lines(_COLUMNS)])

    def close(self) -> None:
        stages = [*self.over, *self.stages.shown.values()]
        if len(stages) > 1:
            seconds = max(stage.last for stage in stages) - min(stage.began for stage in stages)
            self._show(
                [[(f"✓ {clock(seconds)}  {len(stages)} stages, from {stages[0].name} to {stages[-1].name}", "")]]
            )
        else:
            self._show([line for stage in stages for line in stage_lines(stage, _COLUMNS, stopped=True)])

    def _show(self, lines: list[Line]) -> None:
        text = "\n".join("".join(part for part, _ in line) for line in lines)
        self.handle.update({"text/plain": text}, raw=True)

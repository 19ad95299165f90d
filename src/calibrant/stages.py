"""What a display of progress shows: the stages of a call, each with its time, count and remark, as lines of a width."""

from __future__ import annotations

import textwrap
import time
from collections.abc import Iterator
from dataclasses import dataclass, field

Line = list[tuple[str, str]]  # parts of a line, each a text and its style

_BAR = 8, 24  # columns of a bar, at least and at most
_REMARK = 10  # columns in which a part of a remark still says something
_FRAMES = {False: "|/-\\", True: "⠋⠙⠹⠸⠼⠴⠦⠧⠇⠏"}  # by whether the display can show more than ASCII
_SIGNS = {False: "*#-", True: "✓━─"}  # finished; done and left of a bar


@dataclass
class Stage:
    """A stage: when it began, how much of it is done, and the times of its first and latest report.

    A stage of one part, such as the writing of a report, has no count.
    """

    name: str
    began: float
    first: tuple[float, int]
    last: float
    done: int
    total: int
    text: str

    def seconds(self, now: float) -> float:
        """Time since the stage began; once it has finished, the time that it took."""
        return (self.last if self.is_finished else now) - self.began

    @property
    def is_finished(self) -> bool:
        return self.done >= self.total

    @property
    def count(self) -> str:
        return f"{self.done}/{self.total}" if self.total > 1 else ""

    def left(self, now: float) -> float | None:
        """Seconds left at the pace since the first report; None while that is not known."""
        moment, done = self.first
        if not done < self.done < self.total:
            return None
        pace = (self.last - moment) / (self.done - done)
        return max(pace * (self.total - self.done) - (now - self.last), 0.0)


@dataclass
class Stages:
    """The stages of a call that are shown together, as they are reported.

    Names of stages begin with that of a process, where several run side by side ("vae: fit"). A stage that has finished
    stays among those shown until its process reports another one, since a better last report may follow.

    Attributes:
        shown: name → stage that runs, or has just finished.
        latest: the stage of the latest report.
    """

    shown: dict[str, Stage] = field(default_factory=dict)
    latest: Stage | None = None
    _ended: dict[str, float] = field(default_factory=dict)  # process → when its latest stage ended

    def report(self, name: str, done: int, total: int, text: str = "") -> list[Stage]:
        """Take a report; returns the stages that are no longer shown.

        A stage that is first reported after a part of it began when the one before it, of the same process, ended.
        """
        now, process = time.monotonic(), _process(name)
        others = [one for one in self.shown.values() if _process(one.name) == process]
        over = [one for one in others if one.is_finished and (one.name != name or done < one.done)]
        for one in over:
            del self.shown[one.name]
        stage = self.shown.get(name)
        if stage is None or done < stage.done:
            began = self._ended.get(process, now) if done else now
            stage = Stage(name, began, (now, done), now, done, total, text)
            self.shown[name] = stage
        if not stage.is_finished:
            stage.last = now
        stage.done, stage.total, stage.text = done, total, text
        if stage.is_finished:
            self._ended[process] = now
        self.latest = stage
        return over

    def lines(self, width: int, unicode: bool = True) -> list[Line]:
        """The stages that are not over, one below the other, in this many columns."""
        return [line for stage in list(self.shown.values()) for line in stage_lines(stage, width, unicode)]


def _process(name: str) -> str:
    return name.partition(": ")[0] if ": " in name else ""


def clock(seconds: float) -> str:
    """A time in minutes and seconds, or hours as well: 0:07, 1:02:03."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def stage_lines(stage: Stage, width: int, unicode: bool = True, stopped: bool = False) -> list[Line]:
    """A stage, in one line wherever its name, count and times fit into one.

    Args:
        stage: a running one has a spinner, its time, name, bar, count, the time that is left, and its remark; one that
            has finished has no bar and no time left.
        width: number of columns.
        unicode: whether the display can show more than ASCII.
        stopped: whether nothing runs any more, as after an error.
    """
    now = time.monotonic()
    running = not (stage.is_finished or stopped)
    left = stage.left(now) if running else None
    frames = _FRAMES[unicode] if running else _SIGNS[unicode][0] if stage.is_finished else " "
    begin: Line = [
        (f"{frames[int(now * 10) % len(frames)]} ", "cyan" if running else "green"),
        (f"{clock(stage.seconds(now)):>5}  ", ""),
    ]
    end: Line = [(stage.count, ""), (f"{clock(left)} left" if left is not None else "", "cyan")]
    return list(_filled(begin, stage, end, width, _SIGNS[unicode][1:] if running and stage.count else None))


def plain_line(stage: Stage) -> str:
    """A stage in words, for a file."""
    if not stage.count:
        how = f": done in {clock(stage.seconds(stage.last))}" if stage.is_finished else " ..."
        return f"{stage.name}{how} {stage.text}".rstrip()
    left = stage.left(stage.last)
    told = [
        f"{stage.name}: {stage.count}",
        clock(stage.seconds(stage.last)) if stage.done else "",
        f"{clock(left)} left" if left is not None else "",
        stage.text,
    ]
    return ", ".join(part for part in told if part)


def _filled(begin: Line, stage: Stage, end: Line, width: int, bar: str | None) -> Iterator[Line]:
    """The name between begin and end, with a bar and the remark where there is room; what is too long goes on below.

    `bar` holds the two characters of a bar; None for no bar.
    """
    told = [part for text, style in end if text for part in (("  ", ""), (text, style))]
    room = width - _length(begin) - len(stage.name) - _length(told)
    if room >= 0:
        yield [*begin, (stage.name, "bold"), *_with_bar(stage, told, room, bar)]
        return
    indent = _length(begin)
    first, *others = textwrap.wrap(stage.name, max(width - indent, _BAR[0])) or [""]
    yield [*begin, (first, "bold")]
    for other in others:
        yield [(" " * indent, ""), (other, "bold")]
    yield [(" " * (indent - 2), ""), *_with_bar(stage, told, width - indent - _length(told) + 2, bar)]


def _with_bar(stage: Stage, told: Line, room: int, bar: str | None) -> Line:
    columns = min(max(room - 4 - len(stage.text), _BAR[0]), _BAR[1], room - 2) if bar else 0
    line: Line = []
    if bar and columns >= _BAR[0]:
        done = columns * stage.done // stage.total
        line = [("  ", ""), (bar[0] * done, "cyan"), (bar[1] * (columns - done), "dim")]
    room -= _length(line) + 2
    remark = stage.text if len(stage.text) <= room else f"{stage.text[: max(room - 1, 0)].rstrip(' ,;')}…"
    is_told = stage.text and (room >= len(stage.text) or room >= _REMARK)
    return [*line, *told, *([("  ", ""), (remark, "dim")] if is_told else [])]


def _length(line: Line) -> int:
    return sum(len(text) for text, _ in line)

"""Progress: what lines say at every width, where they are shown, and the argument `progress` of all functions."""

from __future__ import annotations

import inspect
import io
import re
import sys
import threading
import time
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from small_models import hierarchical

import calibrant as cal
from calibrant import displays
from calibrant.calls import own_call
from calibrant.errors import CalibrantError
from calibrant.progress import Progress, bars, silent
from calibrant.stages import Stages, clock, stage_lines

LONG = "ea-vae-collapsed: posterior predictive of simulated data"
NAMES = ("vae: fit", "calibration", LONG)


def public_functions() -> Iterator[tuple[str, Callable[..., Any]]]:
    """All public functions that have an argument `progress`."""
    for facade in cal.__all__:
        module = getattr(cal, facade)
        for name in getattr(module, "__all__", ()):
            function = getattr(module, name)
            if inspect.isfunction(function) and "progress" in inspect.signature(function).parameters:
                yield f"{facade}.{name}", function


FUNCTIONS = dict(public_functions())


class Clock:
    """The time that stages read."""

    now = 0.0


@pytest.fixture
def clocked(monkeypatch: pytest.MonkeyPatch) -> Clock:
    at = Clock()
    monkeypatch.setattr(time, "monotonic", lambda: at.now)
    return at


def told(line: list[tuple[str, str]]) -> str:
    return "".join(text for text, _ in line)


# -- lines -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("unicode", [True, False])
@pytest.mark.parametrize("width", [40, 60, 80, 100, 200])
@pytest.mark.parametrize("name", NAMES)
def test_every_line_has_its_stage_count_and_times_whole(clocked, name, width, unicode):
    stages = Stages()
    for clocked.now, done in ((0.0, 0), (60.0, 30), (61.0, 128)):
        stages.report(name, done, 128, "held-out ELBO -253.52 ± 0.31 nats, best of 30 epochs")
        lines = [told(line) for line in stages.lines(width, unicode)]
        assert all(len(line) <= width for line in lines)
        text = " ".join(" ".join(lines).split())
        assert name in text
        assert f"{done}/128" in text
        assert f"{clock(clocked.now)}  " in lines[0]
        assert ("3:16 left" in text) == (done == 30)
        assert unicode or text.replace("±", "").replace("…", "").isascii()
        assert len(lines) == 1 or (name == LONG and width < 100)


@pytest.mark.parametrize("width", [80, 100])
@pytest.mark.parametrize("name", NAMES)
def test_a_finished_stage_is_one_line(clocked, name, width):
    stages = Stages()
    stages.report(name, 0, 2000)
    clocked.now = 3723.4
    stages.report(name, 2000, 2000, "a remark " * 20)
    (line,) = stage_lines(stages.shown[name], width)
    assert told(line).startswith(f"✓ 1:02:03  {name}  2000/2000")
    assert "left" not in told(line)
    assert len(told(line)) <= width


def test_a_stage_without_a_count_has_a_spinner_that_turns(clocked):
    stages, seen = Stages(), set()
    stages.report("report", 0, 1)
    for clocked.now in (0.0, 0.1, 0.2):
        ((line,)) = stages.lines(80)
        seen.add(told(line)[0])
        assert told(line)[1:].split() == [clock(clocked.now), "report"]
    assert len(seen) == 3
    stages.report("report", 1, 1)
    assert told(stages.lines(80)[0]).split() == ["✓", "0:00", "report"]


def test_the_time_that_is_left_counts_from_the_first_report(clocked):
    """A training that goes on at epoch 10 has not done ten epochs in no time."""
    stages = Stages()
    stages.report("fit", 10, 20)
    clocked.now = 4.0
    stages.report("fit", 12, 20)
    assert stages.shown["fit"].left(4.0) == pytest.approx(16.0)
    assert stages.shown["fit"].left(10.0) == pytest.approx(10.0)
    assert stages.shown["fit"].left(99.0) == 0.0


def test_a_stage_that_was_not_announced_began_when_its_process_was_free(clocked):
    stages = Stages()
    for clocked.now, name, done in ((0.0, "a: fit", 0), (5.0, "a: fit", 2), (6.0, "b: fit", 1), (7.0, "a: gap", 2)):
        stages.report(name, done, 2)
    assert stages.shown["a: gap"].began == 5.0
    assert stages.shown["b: fit"].began == 6.0
    assert "a: fit" not in stages.shown


def test_the_last_report_of_a_stage_may_be_followed_by_a_better_one():
    stages = Stages()
    assert stages.report("fit", 2, 2, "best") == []
    assert stages.report("fit", 2, 2, "best, still rising") == []
    (over,) = stages.report("reference", 0, 8)
    assert over.text == "best, still rising"
    assert stages.report("fit", 0, 2) == []  # another training


@pytest.mark.parametrize(("seconds", "text"), [(0.4, "0:00"), (59.6, "1:00"), (3599, "59:59"), (36000, "10:00:00")])
def test_times_in_words(seconds, text):
    assert clock(seconds) == text


# -- where -------------------------------------------------------------------------------------------------------------


def test_a_file_gets_a_line_at_once_then_every_ten_seconds_and_at_the_end(clocked, capsys):
    with bars() as progress:
        progress("loading", 0, 1)
        assert capsys.readouterr().err == "loading ...\n"
        for clocked.now, done in ((2.0, 0), (5.0, 1), (13.0, 2), (20.0, 3), (22.0, 4)):
            progress("fit", done, 4, "ELBO -3")
    said = capsys.readouterr().err.splitlines()
    assert said == ["fit: 0/4, ELBO -3", "fit: 2/4, 0:11, 0:11 left, ELBO -3", "fit: 4/4, 0:20, ELBO -3"]


def test_quiet_bars_show_nothing(capsys):
    with bars(quiet=True) as progress:
        progress("fit", 1, 2)
    assert capsys.readouterr() == ("", "")


class Tty(io.StringIO):
    """A terminal in memory."""

    def isatty(self) -> bool:
        return True

    @property
    def text(self) -> str:
        """What was written, without colours."""
        return re.sub(r"\x1b\[[\d;]*m", "", self.getvalue())

    def wait_for(self, text: str) -> None:
        """Wait until the thread that draws has drawn this."""
        begun = time.monotonic()
        while text not in self.text:
            assert time.monotonic() - begun < 30
            time.sleep(0.01)


@pytest.fixture
def terminal(monkeypatch: pytest.MonkeyPatch) -> Tty:
    stream = Tty()
    system = SimpleNamespace(stderr=stream, stdout=stream, modules=sys.modules)  # pytest sets those of sys anew
    monkeypatch.setattr("calibrant.progress.sys", system)
    monkeypatch.setattr("calibrant.displays.sys", system)
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr("calibrant.progress._SOON", 0.0)
    return stream


def call(work: Callable[[Progress], Any], *given: Any, **named: Any) -> Any:
    """Call a public function that does this work."""

    def function(progress: Progress | bool = True) -> Any:
        return work(progress)  # type: ignore[arg-type]

    return own_call(function, "tests")(*given, **named)


def work(progress: Progress) -> str:
    for done in (1, 2, 4):
        progress("fit", done, 4, "a remark")
    return "result"


@pytest.mark.parametrize("seconds", [0.0, 0.01])
def test_a_call_in_a_terminal_shows_bars(terminal, monkeypatch, seconds):
    monkeypatch.setattr("calibrant.progress._SOON", seconds)

    def slow(progress: Progress) -> str:
        progress("fit", 2, 4, "a remark")
        terminal.wait_for("fit  ━")
        progress("fit", 4, 4, "a remark")
        return "result"

    assert call(slow) == "result"
    assert terminal.text.endswith("  fit  4/4  a remark\n")
    assert "✓" in terminal.text
    assert terminal.text.count("\x1b[?25l") == terminal.text.count("\x1b[?25h") == 1, "the cursor is there again"


def test_a_call_that_is_over_soon_shows_nothing(terminal, monkeypatch):
    monkeypatch.setattr("calibrant.progress._SOON", 60.0)
    threads = threading.active_count()
    assert call(work) == "result"
    assert terminal.getvalue() == ""
    time.sleep(0.01)
    assert threading.active_count() <= threads


@pytest.mark.parametrize("given", [{"progress": False}, {"progress": silent}])
def test_a_call_can_be_silenced(terminal, given):
    assert call(work, **given) == "result"
    assert call(work, *given.values()) == "result"
    assert terminal.getvalue() == ""


@pytest.mark.parametrize("term", ["dumb", None])
def test_nothing_is_shown_elsewhere(terminal, monkeypatch, term):
    if term is None:
        monkeypatch.setattr("calibrant.progress.sys.stderr", io.StringIO())
    else:
        monkeypatch.setenv("TERM", term)
    assert call(lambda progress: progress) is silent


def test_a_function_is_called_with_all_that_is_reported(terminal):
    seen = []
    call(work, lambda *report: seen.append(report))
    call(work, progress=lambda *report: seen.append(report))
    assert seen == 2 * [("fit", done, 4, "a remark") for done in (1, 2, 4)]
    assert terminal.getvalue() == ""


@pytest.mark.parametrize("given", [None, 3, "yes"])
def test_what_is_no_progress_is_refused(given):
    with pytest.raises(CalibrantError, match=rf"progress={given!r}: give True \(bars\), False \(nothing\), or a func"):
        cal.inference.fit(hierarchical, None, {}, progress=given)


def test_calls_within_calls_have_no_display_of_their_own(terminal):
    inner = []

    def outer(progress: Progress) -> None:
        inner.append(call(lambda progress: progress))
        inner.append(call(lambda progress: progress, lambda *report: None))
        work(progress)

    call(outer)
    assert inner[0] is silent
    assert inner[1] is not silent
    assert terminal.getvalue().count("\x1b[?25l") == 1
    call(outer, progress=False)
    assert inner[2] is silent


def test_an_error_leaves_the_terminal_as_it_was(terminal):
    before = sys.stdout, sys.stderr

    def interrupted(progress: Progress) -> None:
        progress("fit", 1, 4)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        call(interrupted)
    assert terminal.text.rindex("\x1b[?25h") > terminal.text.rindex("\x1b[?25l")
    assert terminal.text.endswith("  fit  1/4\n"), "what was done stays"
    assert (sys.stdout, sys.stderr) == before


@pytest.mark.parametrize("to_terminal", [True, False])
def test_what_a_program_prints_goes_where_it_went(terminal, monkeypatch, capsys, to_terminal):
    if not to_terminal:
        monkeypatch.setattr("calibrant.displays.sys.stdout", io.StringIO())

    call(lambda progress: print("a line"))
    assert ("a line\n" in terminal.getvalue()) == to_terminal
    assert capsys.readouterr().out == ("" if to_terminal else "a line\n")


class Handle:
    """What a notebook shows in an output that can be updated."""

    def __init__(self) -> None:
        self.texts: list[str] = []

    def update(self, data: dict[str, str], raw: bool) -> None:
        self.texts.append(data["text/plain"])


@pytest.fixture
def notebook(monkeypatch: pytest.MonkeyPatch) -> Handle:
    handle = Handle()
    display = type(sys)("IPython.display")
    display.display = lambda data, raw, display_id: handle  # type: ignore[attr-defined]
    shell = type(sys)("IPython")
    shell.get_ipython = lambda: type("Shell", (), {"kernel": True})()  # type: ignore[attr-defined]
    shell.display = display  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "IPython", shell)
    monkeypatch.setitem(sys.modules, "IPython.display", display)
    monkeypatch.setattr("calibrant.progress._SOON", 0.0)
    monkeypatch.setattr(displays, "_SELDOM", 0.0)
    return handle


def test_a_call_in_a_notebook_leaves_one_line(notebook):
    call(work)
    assert any("━" in text and "2/4" in text for text in notebook.texts)
    assert notebook.texts[-1] == "✓  0:00  fit  4/4  a remark"

    def stages(progress: Progress) -> None:
        work(progress)
        progress("reference", 1, 1)

    call(stages)
    assert notebook.texts[-1] == "✓ 0:00  2 stages, from fit to reference"


# -- of all functions --------------------------------------------------------------------------------------------------


def test_long_functions_have_the_argument():
    names = {name.rpartition(".")[2] for name in FUNCTIONS}
    assert {"fit", "posterior", "reference", "check", "calibration", "remedies", "gap", "run", "features"} <= names
    assert len(names) > 40


@pytest.mark.parametrize("name", FUNCTIONS)
def test_the_argument_is_what_signature_and_docstring_say(name, terminal):
    function = FUNCTIONS[name]
    parameter = inspect.signature(function).parameters["progress"]
    assert (parameter.annotation, parameter.default) == ("Progress | bool", True)
    assert "progress: whether bars are shown in a terminal or notebook, or a function" in (function.__doc__ or "")


def test_a_training_in_a_terminal_says_how_it_ended(terminal):
    data = {"x": torch.randn(64, generator=torch.Generator().manual_seed(0))}
    guide = cal.guides.amortize(hierarchical, data, seed=0)
    cal.inference.fit(hierarchical, guide, data, epochs=2, batch_size=32, compile=False)
    assert re.search(r"✓  0:\d\d  fit  2/2  held-out ELBO .*\n$", terminal.text)

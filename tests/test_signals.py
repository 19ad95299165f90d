"""Ctrl-C and SIGTERM in every stage of real processes: what is there is kept, and the command that is told goes on."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from commands import SMALL, good, refused

import calibrant as cal
from calibrant import store

pytestmark = [
    pytest.mark.skipif(os.name != "posix", reason="signals"),
    pytest.mark.usefixtures("elsewhere"),
]

# A command that sends itself a signal when a stage begins. In the background of a shell, interrupts are ignored, which
# processes inherit.
SENDING = """
import os, signal, sys
from contextlib import contextmanager
from calibrant import cli

signal.signal(signal.SIGINT, signal.default_int_handler)
wanted, number, words = sys.argv[1], int(sys.argv[2]), sys.argv[3:]
sent = []

@contextmanager
def sending(quiet):
    def send(stage, done, total, text=""):
        if stage == wanted and not sent:
            sent.append(stage)
            os.kill(os.getpid(), number)
    yield send

cli.bars = sending
cli.app(words)
"""
SIGNALS = {signal.SIGINT: 130, signal.SIGTERM: 143}
CHECK = [*SMALL[SMALL.index("--draws") :]]
CHECK = [word for i, word in enumerate(CHECK) if "batch" not in word and "batch" not in CHECK[i - 1]]


def signalled(stage: str, number: int, *words: object, threads: str = "1") -> str:
    """Run a command that gets a signal when a stage begins; what it tells in its last line."""
    env = {**os.environ, "PYTHONPATH": str(Path(cal.__file__).parents[1]), "OMP_NUM_THREADS": threads}
    call = [sys.executable, "-c", SENDING, stage, str(int(number)), *map(str, words)]
    done = subprocess.run(call, capture_output=True, text=True, env=env, timeout=300, check=False)
    assert done.returncode == SIGNALS[signal.Signals(number)], done.stderr
    assert "Traceback" not in done.stderr
    assert done.stdout == ""
    return done.stderr.splitlines()[-1]


def go_on(told: str) -> None:
    """Follow what the message says to the letter."""
    found = re.search(r"(?:Resume|Go on) with: (calibrant .*)$", told)
    assert found is not None, told
    good(*shlex.split(found.group(1))[1:])


def fitted(made_runs: Path) -> None:
    shutil.copytree(made_runs / "fitted", "run")


@pytest.mark.slow
@pytest.mark.parametrize("number", SIGNALS)
@pytest.mark.parametrize("stage", ["reference", "posterior", "compare", "calibration", "gap", "report"])
def test_a_check_keeps_what_is_there_and_goes_on(stage, number, made_runs, short_check):
    fitted(made_runs)
    before = {file: Path("run", file).read_bytes() for file in ("model.safetensors", "guide.safetensors")}
    told = signalled(stage, number, "check", "run", *CHECK, "--quick")
    assert told.startswith("interrupted; run keeps: ppca the best weights of 2 epochs")
    for file in store.TREES.values():
        assert (file in told) == Path("run", file).is_file()
    assert not list(Path("run").glob(".*"))  # nothing half written
    assert all(Path("run", file).read_bytes() == content for file, content in before.items())
    go_on(told)
    assert Path("run/report.html").is_file()


@pytest.mark.slow
@pytest.mark.parametrize("number", SIGNALS)
@pytest.mark.parametrize("stage", ["fit", "posterior", "report"])
def test_a_run_keeps_what_is_there_and_is_resumed(stage, number, short_check):
    told = signalled(stage, number, "run", "ppca", "--data", "rows.npz", *SMALL, "--out", "run")
    assert "run keeps: ppca " in told
    go_on(told)
    assert store.read_config("run")["fit"]["epochs"] == 2
    assert Path("run/report.html").is_file()


@pytest.mark.slow
@pytest.mark.parametrize("number", SIGNALS)
def test_a_report_that_is_interrupted_leaves_the_one_before(number, made_runs, short_check):
    shutil.copytree(made_runs / "whole" / "ppca", "run")
    Path("run/report.html").write_text("before")
    told = signalled("report", number, "report", "run")
    assert told.startswith("interrupted; run keeps: run the best weights of 2 epochs, amortized.nc, reference.nc")
    assert Path("run/report.html").read_text() == "before"
    go_on(told)
    assert Path("run/report.html").read_text() != "before"


@pytest.mark.slow
def test_sigterm_ends_two_models_that_run_side_by_side(short_check):
    words = ["run", "ppca", "vae", "--data", "rows.npz", "--set", "latents=2", *SMALL, "--out", "run"]
    told = signalled("vae: fit", signal.SIGTERM, *words, threads="2")
    assert "run keeps: ppca " in told
    assert "; vae " in told
    go_on(told)


def test_sigterm_before_anything_was_saved_ends_in_one_line(monkeypatch):
    """In this process: the handler is set for the command alone."""
    from commands import call

    from calibrant.workflow import preparing

    before = signal.getsignal(signal.SIGTERM)
    monkeypatch.setattr(preparing, "load_splits", lambda *_: signal.raise_signal(signal.SIGTERM))
    status, _, lines = call("fit", "ppca")
    assert (status, lines.splitlines()[-1]) == (143, "interrupted")
    assert "Traceback" not in lines
    assert signal.getsignal(signal.SIGTERM) is before


@pytest.mark.parametrize("how", ["sys.exit('no data')", "sys.exit(3)", "sys.exit()", "raise SystemExit", "exit()"])
@pytest.mark.parametrize("where", ["function", "file", "model"])
def test_code_of_the_user_that_calls_sys_exit_is_one_line(how, where):
    own = {
        "function": f"def rows():\n    {how}\n",
        "file": f"{how}\ndef rows(): pass\n",
        "model": f"from user import Mine\nclass Own(Mine):\n    def forward(self, size):\n        {how}\n",
    }
    Path("own.py").write_text(f"import sys\n{own[where]}")
    sys.path.insert(0, ".")
    try:
        model, data = ("own.py:Own", "user.py:rows") if where == "model" else ("user.py:Mine", "own.py:rows")
        message = refused("fit", model, "--data", data, "--out", "run")
    finally:
        sys.path.remove(".")
        sys.modules.pop("user", None)
    assert "calls sys.exit" in message

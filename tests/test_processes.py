"""Models of a run side by side, each in a process of its own."""

from __future__ import annotations

import os
import pickle
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tasks import dying, failing_or_waiting, reporting, wait_for_an_interrupt

from calibrant import store
from calibrant.errors import RunError
from calibrant.processes import processes_for, side_by_side
from calibrant.progress import Progress
from calibrant.settings import Request
from calibrant.workflow import check_run, run, running

pytestmark = pytest.mark.skipif(os.name != "posix", reason="models run one by one where processes can't be interrupted")


@pytest.fixture(autouse=True)
def two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.mark.slow
def test_tasks_share_the_threads_and_report(tmp_path):
    seen: list[Any] = []
    paths = [tmp_path / name for name in "abc"]
    returned = side_by_side(reporting, [(path,) for path in paths], lambda *what: seen.append(what))
    assert returned == ["a", "b", "c"]
    assert sorted(seen) == [("stage", 1, 2, name) for name in "abc"]
    assert all(path.read_text() == "done" for path in paths)


def test_a_failure_is_raised_and_the_others_keep_what_they_have(tmp_path, monkeypatch):
    warned: list[Any] = []
    monkeypatch.setattr("warnings.showwarning", lambda *what: warned.append(what[:2]))
    with pytest.raises(RunError, match="no luck"):
        side_by_side(failing_or_waiting, [(tmp_path / name,) for name in ("fails", "waits")], lambda *_: None)
    assert (tmp_path / "waits").read_text() == "kept"
    assert warned == [("luck runs out", UserWarning)], "of the tasks; this process alone shows them"


def test_an_interrupt_reaches_every_task(tmp_path):
    started: list[Any] = []

    def interrupt_when_both_wait(*what: Any) -> None:
        started.append(what)
        if len(started) == 2:
            threading.Thread(target=signal.raise_signal, args=(signal.SIGINT,)).start()

    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background has it ignored
    try:
        with pytest.raises(KeyboardInterrupt):
            side_by_side(wait_for_an_interrupt, [(tmp_path / name,) for name in "ab"], interrupt_when_both_wait)
    finally:
        signal.signal(signal.SIGINT, before)
    assert [(tmp_path / name).read_text() for name in "ab"] == ["kept", "kept"]


@pytest.mark.slow
def test_a_process_that_dies_is_noticed(tmp_path):
    with pytest.raises(RunError, match="exit status -9"):
        side_by_side(dying, [(tmp_path / name,) for name in "ab"], lambda *_: None)


STARTED = """
import sys, torch, tasks
from pathlib import Path
from calibrant.processes import side_by_side
torch.set_num_threads(2)
side_by_side(tasks.waiting_for_ever, [(Path(name),) for name in sys.argv[1:]], lambda *_: None)
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc").is_dir(), reason="processes are looked up in /proc")
def test_processes_end_when_their_parent_is_killed(tmp_path):
    files = [tmp_path / name for name in "ab"]
    path = os.pathsep.join([str(Path(store.__file__).parents[1]), str(Path(__file__).parent)])
    parent = subprocess.Popen([sys.executable, "-c", STARTED, *map(str, files)], env={**os.environ, "PYTHONPATH": path})
    until(lambda: all(file.exists() and file.read_text() for file in files))
    parent.kill()
    parent.wait()
    until(lambda: not any(is_running(int(file.read_text())) for file in files))


def until(condition: Callable[[], bool], seconds: float = 120.0) -> None:
    begin = time.monotonic()
    while not condition():
        assert time.monotonic() - begin < seconds
        time.sleep(0.05)


def is_running(process: int) -> bool:
    """Whether a process runs; one that has ended may stay as a zombie until it is asked for its status."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def request_for(folder: Path) -> Request:
    """Two small models of 64 data."""
    rows = np.random.default_rng(0).normal(size=(64, 3)).astype("f4")
    np.savez(folder / "rows.npz", x=rows)
    settings = {"epochs": 1, "batch_size": 32, "draws": 100, "held_out": 4, "simulations": 100, "predictive_draws": 20}
    return Request(
        models=("ppca", "vae"),
        data=str(folder / "rows.npz"),
        arguments={"latents": 2},
        settings=settings,
        out=folder / "run",
    )


def run_and_check(request: Request) -> None:
    seen: set[str] = set()
    outcome = run(request, lambda stage, *_: seen.add(stage))
    assert {"ppca: fit", "vae: fit", "ppca: posterior", "report"} <= seen
    assert [result.name for result in outcome.results] == ["ppca", "vae"]
    assert outcome.report is not None
    stored = store.load_result(request.out / "vae")
    assert outcome.results[1].amortized.identical(stored.amortized)
    assert outcome.results[1].calibration.identical(stored.calibration)
    assert outcome.results[1].history == stored.history
    again = check_run(Request(out=request.out, settings={**request.settings, "held_out": 3}))
    assert [result.amortized["posterior"].sizes["data"] for result in again.results] == [3, 3]
    assert len(store.load_history(request.out / "vae")) == 1


@pytest.mark.truth
def test_two_models_are_run_and_checked_side_by_side(tmp_path, short_check):
    run_and_check(request_for(tmp_path))


def test_what_two_models_are_run_and_checked_with_reaches_other_processes(tmp_path, short_check, monkeypatch):
    """As the test above, with tasks that are pickled and called here: to start processes takes longest."""
    asked = []

    def by_turns(task: Callable[..., Any], arguments: Sequence[tuple[Any, ...]], progress: Progress) -> list[Any]:
        asked.append(len(arguments))
        threads = torch.get_num_threads()
        torch.set_num_threads(1)  # as every process has
        given = pickle.loads(pickle.dumps([(task, *each) for each in arguments]))
        returned = [function(*each, progress) for function, *each in given]
        torch.set_num_threads(threads)
        return pickle.loads(pickle.dumps(returned))

    monkeypatch.setattr(running, "side_by_side", by_turns)
    run_and_check(request_for(tmp_path))
    assert asked == [2, 2]


def test_one_model_or_one_thread_needs_no_process():
    assert processes_for(1) == 1
    torch.set_num_threads(1)
    assert processes_for(2) == 1

"""Tasks that run in parallel, each in a process of its own, since Python with small tensors keeps one core busy."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import queue
import signal
import sys
import threading
import traceback
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from multiprocessing import forkserver
from typing import Any

from calibrant.errors import RunError
from calibrant.interrupts import interrupt_on_sigterm
from calibrant.progress import Progress

_PATIENCE = 0.5  # seconds between two checks whether the processes are alive
# Where a new process is a copy of one that has imported the package, and has computed nothing. Elsewhere a copy of
# a process may not use some of the system's libraries, and each process imports the package itself.
_COPIES = sys.platform == "linux"
# What recordings, the classifier test and pictures import where they begin: seconds for every process that is no copy.
_LATER = (
    "torch._dynamo",
    "sklearn.covariance",
    "matplotlib.pyplot",
    "matplotlib.backends.backend_agg",
    "arviz_plots.backend.matplotlib",
)


def processes_for(tasks: int) -> int:
    """How many tasks to run at a time: one per thread of torch, or one where processes cannot be interrupted."""
    import torch

    return min(tasks, torch.get_num_threads()) if os.name == "posix" else 1


def import_ahead(module: str) -> None:
    """Begin to import a module for the processes of `side_by_side`, while this process goes on with other work."""
    if not _COPIES or threading.current_thread() is not threading.main_thread():
        return
    forkserver.set_forkserver_preload([module, *_LATER])
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)  # inherited: a terminal sends it to all processes
    try:
        forkserver.ensure_running()
    finally:
        signal.signal(signal.SIGINT, before)


def side_by_side(task: Callable[..., Any], arguments: Sequence[tuple[Any, ...]], progress: Progress) -> list[Any]:
    """Call `task(*one, progress)` for each `one` in `arguments`, in as many processes at a time as torch has threads.

    The processes share these threads. On Ctrl-C, or if a task fails, KeyboardInterrupt is raised in all running tasks,
    so that each can save its results.

    Args:
        task: a function that is defined at the top level of a module.
        arguments: the arguments of each call, which must be picklable.
        progress: called in this process with what the tasks report; their warnings are shown by this process too.

    Returns:
        What the calls returned, in the order of `arguments`; it must be picklable.

    Raises:
        RunError: if a process exits without reporting.
        Exception: the exception that a task raised.
    """
    import torch

    count = processes_for(len(arguments))
    context: Any = multiprocessing.get_context("forkserver" if _COPIES else "spawn")
    messages: Any = context.Queue()
    waiting, running, silent = list(enumerate(arguments)), dict[int, Any](), set[int]()
    returned = dict[int, Any]()
    import_ahead(task.__module__)
    try:
        while waiting or running:
            while waiting and len(running) < count:
                number, given = waiting.pop(0)
                own = (task, given, number, torch.get_num_threads() // count, dict(os.environ), messages)
                running[number] = context.Process(target=_child, args=own)
                running[number].start()
            try:
                number, kind, content = messages.get(timeout=_PATIENCE)
            except queue.Empty:
                silent = _require_word(running, silent)
                continue
            if kind == "progress":
                progress(*content)
            elif kind == "warning":
                warnings.showwarning(*content)
            else:
                running.pop(number).join()
                if kind == "failed":
                    raise content
                returned[number] = content
    finally:
        for process in running.values():
            process.terminate()
        for process in running.values():
            process.join()
    return [returned[number] for number in range(len(arguments))]


def _require_word(running: dict[int, Any], silent: set[int]) -> set[int]:
    """The processes that have exited; one that had exited at the last check and still has not reported is an error."""
    ended = {number for number, process in running.items() if process.exitcode is not None}
    if lost := ended & silent:
        code = running[min(lost)].exitcode
        raise RunError(
            f"a process of this run was ended from outside (exit status {code}); if memory was short, run the models "
            "one by one, or set OMP_NUM_THREADS=1"
        )
    return ended


def _child(
    task: Callable[..., Any],
    given: tuple[Any, ...],
    number: int,
    threads: int,
    environment: dict[str, str],
    messages: Any,
) -> None:
    import torch

    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a terminal sends it to all processes; the parent forwards it
    interrupt_on_sigterm()
    os.environ.update(environment)  # a copied process has that of the time at which the first one was made
    threading.Thread(target=_end_with_parent, daemon=True).start()
    torch.set_num_threads(threads)
    warnings.showwarning = partial(_send_warning, messages, number)
    try:
        found = task(*given, partial(_send, messages, number))
    except KeyboardInterrupt:
        return
    except BaseException as error:
        messages.put((number, "failed", _sendable(error)))
    else:
        messages.put((number, "done", found))


def _end_with_parent() -> None:
    """End this process at once when its parent was killed, since a new run may work in the same folder."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _send(messages: Any, number: int, stage: str, done: int, total: int, text: str = "") -> None:
    messages.put((number, "progress", (stage, done, total, text)))


def _send_warning(
    messages: Any, number: int, message: Warning | str, category: type, name: str, line: int, *_: Any
) -> None:
    """Warnings are shown by the parent, which alone knows what else is on the terminal; it may lack a user's class."""
    known = next(kind for kind in category.__mro__ if kind.__module__ == "builtins")
    messages.put((number, "warning", (str(message), known, name, line)))


def _sendable(error: BaseException) -> BaseException:
    try:
        pickle.loads(pickle.dumps(error))
        return error
    except Exception:  # an error class of another package whose arguments cannot be pickled
        return RuntimeError("".join(traceback.format_exception(error)))

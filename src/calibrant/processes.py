"""Tasks that run in parallel, each in a process of its own, since Python with small tensors keeps one core busy."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import queue
import signal
import threading
import traceback
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch

from calibrant.errors import RunError
from calibrant.interrupts import interrupt_on_sigterm
from calibrant.progress import Progress

_PATIENCE = 0.5  # seconds between two checks whether the processes are alive


def processes_for(tasks: int) -> int:
    """How many tasks to run at a time: one per thread of torch, or one where processes cannot be interrupted."""
    return min(tasks, torch.get_num_threads()) if os.name == "posix" else 1


def side_by_side(task: Callable[..., None], arguments: Sequence[tuple[Any, ...]], progress: Progress) -> None:
    """Call `task(*one, progress)` for each `one` in `arguments`, in as many processes at a time as torch has threads.

    The processes share these threads. On Ctrl-C, or if a task fails, KeyboardInterrupt is raised in all running tasks,
    so that each can save its results.

    Args:
        task: a function that is defined at the top level of a module.
        arguments: the arguments of each call, which must be picklable.
        progress: called in this process with what the tasks report.

    Raises:
        RunError: if a process exits without reporting.
        Exception: the exception that a task raised.
    """
    count = processes_for(len(arguments))
    context = multiprocessing.get_context("spawn")
    messages: Any = context.Queue()
    waiting, running, silent = list(enumerate(arguments)), dict[int, Any](), set[int]()
    try:
        while waiting or running:
            while waiting and len(running) < count:
                number, given = waiting.pop(0)
                own = (task, given, number, torch.get_num_threads() // count, messages)
                running[number] = context.Process(target=_child, args=own)
                running[number].start()
            try:
                number, kind, content = messages.get(timeout=_PATIENCE)
            except queue.Empty:
                silent = _require_word(running, silent)
                continue
            if kind == "progress":
                progress(*content)
            else:
                running.pop(number).join()
                if kind == "failed":
                    raise content
    finally:
        for process in running.values():
            process.terminate()
        for process in running.values():
            process.join()


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


def _child(task: Callable[..., None], given: tuple[Any, ...], number: int, threads: int, messages: Any) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a terminal sends it to all processes; the parent forwards it
    interrupt_on_sigterm()
    threading.Thread(target=_end_with_parent, daemon=True).start()
    torch.set_num_threads(threads)
    try:
        task(*given, partial(_send, messages, number))
    except KeyboardInterrupt:
        return
    except BaseException as error:
        messages.put((number, "failed", _sendable(error)))
    else:
        messages.put((number, "done", None))


def _end_with_parent() -> None:
    """End this process at once when its parent was killed, since a new run may work in the same folder."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _send(messages: Any, number: int, stage: str, done: int, total: int, text: str = "") -> None:
    messages.put((number, "progress", (stage, done, total, text)))


def _sendable(error: BaseException) -> BaseException:
    try:
        pickle.loads(pickle.dumps(error))
        return error
    except Exception:  # an error class of another package whose arguments cannot be pickled
        return RuntimeError("".join(traceback.format_exception(error)))

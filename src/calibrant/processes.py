"""Tasks side by side, each in a process of its own: Python and small tensors leave the other cores idle."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import queue
import signal
import traceback
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch

from calibrant.errors import RunError
from calibrant.progress import Progress

_PATIENCE = 0.5  # seconds between two looks at whether the processes live


def processes_for(tasks: int) -> int:
    """How many of the tasks to run at a time: one for each of torch's threads, where processes can be interrupted."""
    return min(tasks, torch.get_num_threads()) if os.name == "posix" else 1


def side_by_side(task: Callable[..., None], arguments: Sequence[tuple[Any, ...]], progress: Progress) -> None:
    """Call `task(*arguments, progress)` for each of some arguments, as many at a time as there are threads.

    The processes share torch's threads. Ctrl-C, and a task that fails, raise KeyboardInterrupt in all tasks that run,
    so that each can keep what it has.

    Args:
        task: a function of a module.
        arguments: of each call; they must be picklable.
        progress: called here with what the tasks report.

    Raises:
        RunError: when a process ends without a word.
        Exception: what a task raised.
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
    """The processes that have ended; one whose last message has not come since the look before died without it."""
    ended = {number for number, process in running.items() if process.exitcode is not None}
    if lost := ended & silent:
        code = running[min(lost)].exitcode
        raise RunError(
            f"a process of this run was ended from outside (exit status {code}); where memory was short, run the "
            "models one by one, or set OMP_NUM_THREADS=1"
        )
    return ended


def _child(task: Callable[..., None], given: tuple[Any, ...], number: int, threads: int, messages: Any) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a terminal sends it to all processes; the first one passes it on
    signal.signal(signal.SIGTERM, _interrupt)
    torch.set_num_threads(threads)
    try:
        task(*given, partial(_send, messages, number))
    except KeyboardInterrupt:
        return
    except BaseException as error:
        messages.put((number, "failed", _sendable(error)))
    else:
        messages.put((number, "done", None))


def _interrupt(*_: Any) -> None:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    raise KeyboardInterrupt


def _send(messages: Any, number: int, stage: str, done: int, total: int, text: str = "") -> None:
    messages.put((number, "progress", (stage, done, total, text)))


def _sendable(error: BaseException) -> BaseException:
    try:
        pickle.loads(pickle.dumps(error))
        return error
    except Exception:  # an error of somebody else's, with arguments that can't be sent
        return RuntimeError("".join(traceback.format_exception(error)))

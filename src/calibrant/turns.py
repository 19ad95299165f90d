"""Threads take turns: Pyro's handlers and torch's default dtype belong to the whole process.

A thread waits until the call of another one has returned; calls within calls of the same thread go on. A function of
the user that a call runs, such as `progress`, may itself wait for another thread that calls this package. Neither would
then go on, so that the waiting thread is refused.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

from calibrant.errors import InferenceError

_LOOK = 0.2  # seconds between two looks at the call of another thread
_STUCK = 10.0  # seconds in a function of the user after which another thread no longer waits


class _Turns:
    def __init__(self) -> None:
        self.changed = threading.Condition()
        self.owner: int | None = None
        self.depth = 0
        self.outside_since: float | None = None

    def take(self) -> float | None:
        """Wait for the turn of this thread; returns since when it is in a function of the user, None if it is not."""
        thread = threading.get_ident()
        with self.changed:
            while self.owner not in (None, thread):
                since = self.outside_since
                if since is not None and time.monotonic() - since > _STUCK:
                    raise InferenceError(
                        "another thread is in a call of calibrant, whose progress function (or other function of "
                        f"yours) has not returned for {_STUCK:g} seconds: Pyro runs one program at a time in a "
                        "process, so call again when it has returned (it must not wait for this thread), or use a "
                        "process of its own"
                    )
                self.changed.wait(_LOOK)
            self.owner, self.depth = thread, self.depth + 1
            since, self.outside_since = self.outside_since, None
            return since

    def give_back(self, outside: bool) -> None:
        with self.changed:
            self.depth -= 1
            self.outside_since = time.monotonic() if outside else None
            if self.depth == 0:
                self.owner = None
                self.changed.notify()


_turns = _Turns()
if hasattr(os, "register_at_fork"):  # the thread that had the turn does not exist in a forked process
    os.register_at_fork(after_in_child=_turns.__init__)  # type: ignore[misc]


@contextmanager
def turn() -> Iterator[bool]:
    """Run programs while no other thread does; a call that is already inside a turn of its thread goes on.

    Returns:
        Whether the turn begins here, and not in a call around this one.

    Raises:
        InferenceError: if the thread whose turn it is has been in a function of the user for ten seconds.
    """
    since = _turns.take()
    try:
        yield _turns.depth == 1
    finally:
        _turns.give_back(since is not None)


@contextmanager
def outside() -> Iterator[None]:
    """Run a function of the user within a turn; calls of this package by that function belong to the same turn."""
    before = _turns.outside_since
    _turns.outside_since = time.monotonic()
    try:
        yield
    finally:
        _turns.outside_since = before

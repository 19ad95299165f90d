"""SIGTERM, which batch systems send before they end a process, ends a call like Ctrl-C. Nothing slow is imported."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

INTERRUPTED, TERMINATED = 128 + signal.SIGINT, 128 + signal.SIGTERM  # exit codes after the two signals


def interrupt_on_sigterm() -> None:
    """Raise KeyboardInterrupt at the first SIGTERM; further ones are ignored while results are kept."""
    signal.signal(signal.SIGTERM, _interrupt)


def _interrupt(*_: Any) -> None:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    raise KeyboardInterrupt


@contextmanager
def sigterm_interrupts() -> Iterator[None]:
    """Let SIGTERM interrupt what runs inside, if this is the main thread, which alone receives signals."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.getsignal(signal.SIGTERM)
    interrupt_on_sigterm()
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def exit_code() -> int:
    """The exit code after an interrupt that `sigterm_interrupts` surrounds: 143 after SIGTERM, 130 after Ctrl-C."""
    return TERMINATED if signal.getsignal(signal.SIGTERM) is signal.SIG_IGN else INTERRUPTED

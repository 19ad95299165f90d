"""What a measurement of speed counts: seconds spent on graphs, and leapfrogs. Without one, nothing is counted."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass


@dataclass
class Meter:
    """Counts of what runs inside `metered`.

    Attributes:
        clock: returns seconds.
        preparing: seconds in which graphs were recorded and compiled.
        leapfrogs: number of leapfrog steps of all chains, in iterations that have ended.
    """

    clock: Callable[[], float]
    preparing: float = 0.0
    leapfrogs: int = 0


_meter: ContextVar[Meter | None] = ContextVar("meter", default=None)


@contextmanager
def metered(clock: Callable[[], float] = time.perf_counter) -> Iterator[Meter]:
    """Count what runs inside."""
    before = _meter.set(meter := Meter(clock))
    try:
        yield meter
    finally:
        _meter.reset(before)


def running_meter() -> Meter | None:
    """The meter of the measurement that is going on, if there is one."""
    return _meter.get()


@contextmanager
def preparing() -> Iterator[None]:
    """Count the seconds inside, in which a graph is recorded or compiled."""
    meter = _meter.get()
    began = meter.clock() if meter is not None else 0.0
    try:
        yield
    finally:
        if meter is not None:
            meter.preparing += meter.clock() - began

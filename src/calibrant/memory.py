"""How much memory one run of a program may take, and blocks of rows that keep to it.

Draws come in blocks, whose size follows from the program alone: the memory that a row takes is measured in two small
runs, and a block takes at most 2 GiB. The same seed therefore gives the same draws on every machine. Only where less is
allowed, or an allocation fails, blocks are smaller; the draws then come from the same random stream in another order.
"""

from __future__ import annotations

import os
import sys
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from calibrant.errors import InferenceError

T = TypeVar("T")

FEW = 4  # number of data, or of draws, of the run by which the memory of a row is measured
GIB = 1 << 30
BLOCK = 2 * GIB  # bytes of all tensors of one run
_SHARE = 0.5  # share of the free memory that a run may take
_TIMES = 32  # size of the larger of two small runs, from which the memory of a row follows
_MEMINFO, _CGROUP = Path("/proc/meminfo"), Path("/sys/fs/cgroup")
_TOO_LARGE = (
    "one draw of one datum does not fit into the memory that is free: end other programs, or use a guide with smaller "
    "matrices"
)
_NO_MEMORY = ("can't allocate memory", "not enough memory", "out of memory")
_budget: ContextVar[int | None] = ContextVar("memory budget", default=None)


@contextmanager
def limited(gib: float | None) -> Iterator[None]:
    """Let the runs inside take at most this much memory, in GiB; None keeps what holds outside.

    Raises:
        InferenceError: for a limit that is not positive.
    """
    if gib is not None and not gib > 0:
        raise InferenceError(f"memory={gib}: give the memory that one run of a program may take, in GiB")
    before = _budget.set(_budget.get() if gib is None else int(gib * GIB))
    try:
        yield
    finally:
        _budget.reset(before)


def budget() -> int:
    """Bytes that one run of a program may take: the limit that was set, else half of the memory that is free now."""
    limit = _budget.get()
    return int(_SHARE * free_memory()) if limit is None else limit


def free_memory() -> int:
    """Bytes that this process can still take: what the machine has free, and what its control group allows."""
    return min(_free_in_machine(), _free_in_group())


def _free_in_machine() -> int:
    try:
        for line in _MEMINFO.read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    except (OSError, ValueError, IndexError):
        pass
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2
    except (AttributeError, OSError, ValueError):  # a system that does not tell
        return 4 * GIB


def _free_in_group() -> int:
    try:
        most, used = (int((_CGROUP / f"memory.{name}").read_text()) for name in ("max", "current"))
        cached = dict(line.split() for line in (_CGROUP / "memory.stat").read_text().splitlines())["inactive_file"]
        return max(0, most - used + int(cached))  # the system gives up cached files when memory is short
    except (OSError, ValueError, KeyError):  # no group, or one without a limit ("max")
        return sys.maxsize


def peak_memory() -> int:
    """Largest number of bytes that this process has held in memory so far; 0 where the system does not tell."""
    if os.name != "posix":
        return 0
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


# -- blocks ------------------------------------------------------------------------------------------------------------


class Measured(TorchDispatchMode):
    """Inside, counts the bytes of all tensors that are made and live at the same time; `peak` is the largest number."""

    @classmethod
    def _should_skip_dynamo(cls) -> bool:  # else torch imports its compiler at the first use, which takes 1.5 s
        return False

    def __init__(self) -> None:
        super().__init__()
        self.peak = self._now = 0
        self._users: dict[int, int] = {}

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        for value in result if isinstance(result, tuple | list) else (result,):
            if isinstance(value, Tensor):
                self._count(value)
        return result

    def _count(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        place, size = storage.data_ptr(), storage.nbytes()
        if place not in self._users:
            self._now += size
            self.peak = max(self.peak, self._now)
        self._users[place] = self._users.get(place, 0) + 1
        weakref.finalize(tensor, self._drop, place, size)

    def _drop(self, place: int, size: int) -> None:
        self._users[place] -= 1
        if not self._users[place]:
            del self._users[place]
            self._now -= size


def measured_rows(
    most: int, rows: int, run: Callable[[int], Any], known: dict[tuple[int, int], int] | None = None
) -> int:
    """How many rows one run may have; random state is left unchanged.

    Args:
        most: the largest number, which suits a program whose rows are small.
        rows: number of rows of `run(1)`.
        run: a function that runs the program with so many times these rows.
        known: (rows, times) → bytes that such a run took, where the same program has run on other data; what is
            measured is added.
    """
    limit, peaks, known = min(BLOCK, budget()), list[int](), {} if known is None else known
    for times in (_TIMES, _TIMES // 2):
        if (rows, times) not in known:
            with torch.random.fork_rng(), Measured() as found:
                run(times)
            known[rows, times] = found.peak
        peaks.append(known[rows, times])
        if most * peaks[0] <= limit * rows * _TIMES:  # even with what does not grow with the rows
            return most
    each = max(1, (peaks[0] - peaks[1]) // (rows * (_TIMES // 2)))
    return max(1, min(most, limit // each))


def blocks(data: int, draws: int, rows: int) -> Iterator[tuple[Tensor, tuple[Tensor, ...]]]:
    """Blocks of data with at most `rows` rows in a run: positions of the data, and of the draws in each run.

    All draws of some data form one run; only if the draws of one datum are too many, they take several.
    """
    parts = torch.arange(draws, device="cpu").split(rows)
    for index in torch.arange(data, device="cpu").split(max(1, rows // draws)):
        yield index, parts


# -- allocations that fail ---------------------------------------------------------------------------------------------


def is_memory_error(error: BaseException) -> bool:
    """Whether an error says that there was not enough memory, of the machine or the device."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and any(words in str(error) for words in _NO_MEMORY)


def within_memory(run: Callable[[], T], smallest: bool) -> T | None:
    """The result of a run; None if there is not enough memory for it, and a smaller one is to be tried.

    Raises:
        InferenceError: if there is not enough memory for the `smallest` run.
    """
    try:
        return run()
    except Exception as error:
        if not is_memory_error(error):
            raise
        if smallest:
            raise InferenceError(_TOO_LARGE) from error
    return None


def halved(run: Callable[[Tensor, Tensor], list[Tensor]], index: Tensor, draws: Tensor) -> list[Tensor]:
    """Call `run(index, draws)`; where memory is short, in halves of the draws, or of the data if each has one draw.

    Args:
        run: a function of the positions of data and of draws, with results `(draws, data, …)`.
        index: positions of the data.
        draws: positions of the draws.

    Raises:
        InferenceError: if one row does not fit into the memory.
    """
    found = within_memory(lambda: run(index, draws), smallest=len(draws) == len(index) == 1)
    if found is not None:
        return found
    if len(draws) > 1:
        halves = [halved(run, index, part) for part in draws.tensor_split(2)]
        return [torch.cat(pair, 0) for pair in zip(*halves, strict=True)]
    halves = [halved(run, part, draws) for part in index.tensor_split(2)]
    return [torch.cat(pair, 1) for pair in zip(*halves, strict=True)]


def in_blocks(
    run: Callable[[Tensor, Tensor], list[Tensor]],
    data: int,
    draws: int,
    rows: int,
    told: Callable[[int], None] = lambda done: None,
) -> list[Tensor]:
    """Results `(draws, data, …)` of `run(index, draws)` for all data and draws, block by block.

    Args:
        run: as for `halved`.
        data: number of data.
        draws: number of draws per datum.
        rows: largest number of rows in a run.
        told: called with the number of data that are done.
    """
    found: list[list[Tensor]] = []
    for index, parts in blocks(data, draws, rows):
        of_parts = [halved(run, index, part) for part in parts]
        found.append([torch.cat(part, 0) for part in zip(*of_parts, strict=True)] if len(parts) > 1 else of_parts[0])
        told(int(index[-1]) + 1)
    return [torch.cat(part, 1) for part in zip(*found, strict=True)]

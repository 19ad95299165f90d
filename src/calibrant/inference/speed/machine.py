"""The machine on which something is measured: what it is, its clock, and how fast it multiplies matrices."""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from calibrant.folders.configuration import versions

_CPUINFO = Path("/proc/cpuinfo")
_SIZE = {"cpu": 1024, "cuda": 8192}  # of the matrices, so large that the time of a call does not count
_PRODUCTS = 9  # of which the fastest counts


def machine(device: torch.device) -> dict[str, str]:
    """Processor, cores, threads, device and versions that figures of speed depend on."""
    found = versions()
    return {
        "processor": _processor(),
        "cores": str(_cores()),
        "threads": str(torch.get_num_threads()),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else str(device),
        **{name: found[name] for name in ("calibrant", "torch", "python")},
    }


def _processor() -> str:
    """The name of the processor, where the system tells it."""
    try:
        lines = _CPUINFO.read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor() or platform.machine())


def _cores() -> int:
    """Number of cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def now(device: torch.device) -> float:
    """Seconds of a clock, read once all work on the device is done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def seconds_of(function: Callable[[], object], device: torch.device, repeats: int) -> float:
    """Seconds of a call, as the mean of some."""
    began = now(device)
    for _ in range(repeats):
        function()
    return (now(device) - began) / repeats


def matrix_rate(device: torch.device, dtype: torch.dtype) -> float:
    """Floating-point operations a second in the product of two large matrices."""
    size = _SIZE.get(device.type, _SIZE["cpu"])
    a, b = (torch.ones(size, size, device=device, dtype=dtype) for _ in range(2))
    out = torch.empty_like(a)

    def product() -> Tensor:
        return torch.mm(a, b, out=out)

    product()
    return 2 * size**3 / min(seconds_of(product, device, 1) for _ in range(_PRODUCTS))

"""Functions of tensors, recorded once as a graph and compiled.

Running a Pyro program costs a millisecond or more of handlers however little it computes. Recorded by `make_fx`, the
same arithmetic is a flat graph that runs at the speed of its kernels and that `torch.compile` takes. Python numbers are
baked into the graph, so that what changes from call to call must be a tensor; so are shapes: one graph a batch size.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pyro
import torch
from torch import Tensor
from torch.fx import GraphModule
from torch.fx.experimental.proxy_tensor import make_fx

from calibrant.program.environment import validation_kept

Outputs = tuple[Tensor, ...]
TensorFunction = Callable[..., Outputs]


def record(function: TensorFunction, *example: Tensor) -> TensorFunction:
    """The function as a graph for inputs of the example's shapes, dtypes and device.

    What can't be recorded (control flow that depends on values, `.item()`) runs as it is, after one warning.
    """
    graph = _graph(function, *example)
    return function if graph is None else _without_python(graph, *example)


def compiled(function: TensorFunction, *example: Tensor) -> TensorFunction:
    """As `record`, and compiled by torch's inductor; the recorded graph where that fails, after one warning.

    Compiling takes some ten seconds, and saves most of the time of a call. The graph goes to inductor by itself:
    `torch.compile` would trace it again, and look for changed inputs before every call, which takes as long as the
    arithmetic of a hundred lanes.
    """
    graph = _graph(function, *example)
    if graph is None:
        return function
    try:
        with _quiet(), validation_kept(), torch.no_grad():  # the compiler's first use turns validation off
            contiguous: list[Any] = [tensor.contiguous() for tensor in example]
            fast = torch._inductor.compile(graph, contiguous, {"fallback_random": True})  # torch's random numbers

        def run(*tensors: Tensor) -> Outputs:
            with torch.no_grad():
                return fast(*(tensor.contiguous() for tensor in tensors))

        run(*example)
        return run
    except Exception as error:  # no C++ compiler, an operator without lowering, …
        _warn("compiled", error)
        return _without_python(graph, *example)


def _graph(function: TensorFunction, *example: Tensor) -> GraphModule | None:
    try:
        with pyro.validation_enabled(False), torch.enable_grad():
            return make_fx(function)(*example)
    except Exception as error:  # whatever a user's program makes the tracer raise
        _warn("recorded", error)
        return None


def _without_python(graph: GraphModule, *example: Tensor) -> TensorFunction:
    """The graph run by TorchScript's interpreter, a third of Python's time an operator; as it is where that fails."""
    try:
        with warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore")  # its tracer is deprecated for programs; this is a flat graph
            return torch.jit.trace(graph, example, check_trace=False)
    except Exception:
        return graph


def _warn(what: str, error: Exception) -> None:
    first = (str(error).strip() or type(error).__name__).splitlines()[0]
    warnings.warn(f"the program could not be {what} and runs more slowly: {first[:200]}", RuntimeWarning, stacklevel=4)


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the compiler's own messages: a failure is told in one warning."""
    loggers = [logging.getLogger(name) for name in ("torch._dynamo", "torch._inductor", "torch.utils.cpp_extension")]
    levels: list[Any] = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)

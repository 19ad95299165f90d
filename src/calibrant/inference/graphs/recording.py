"""Functions of tensors that are recorded once as a graph and can be compiled.

A run of a Pyro program spends a millisecond or more in handlers, however little it computes. Recorded by `make_fx`, the
same arithmetic becomes a flat graph that runs at the speed of its kernels and that `torch.compile` accepts. Python
numbers are constants in the graph, so that everything that changes from call to call must be a tensor. Shapes are
constants, too: each batch size needs its own graph.
"""

from __future__ import annotations

import gc
import logging
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, cast

import pyro
import torch
from torch import Tensor
from torch._guards import TracingContext, tracing
from torch._subclasses import FakeTensorMode
from torch.fx import GraphModule
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.experimental.symbolic_shapes import ShapeEnv

from calibrant.errors import warn
from calibrant.inference.graphs.passes import simplify
from calibrant.program.environment import recording, validation_kept

Outputs = tuple[Tensor, ...]
TensorFunction = Callable[..., Outputs]


def record(function: TensorFunction, *example: Tensor) -> TensorFunction:
    """Record the function as a graph for inputs with the shapes, dtypes and device of the example.

    A function that cannot be recorded (control flow that depends on values, `.item()`) is returned unchanged, after a
    warning.
    """
    graph = _graph(function, *example)
    return function if graph is None else _without_python(graph, *example)


def compiled(function: TensorFunction, *example: Tensor) -> TensorFunction:
    """Record the function as `record` does, and compile the graph with torch's inductor.

    If compiling fails, the recorded graph is used, after a warning. Compiling takes some ten seconds, and saves most of
    the time of a call. What was compiled is kept in torch's cache on disk (`TORCHINDUCTOR_CACHE_DIR`), so that a later
    call or process with the same graph and shapes needs only a second or two; numbers in tensors that the function
    closes over, such as the weights of a network, may differ.
    """
    graph = _graph(function, *example)
    if graph is None:
        return function
    try:
        with _quiet(), validation_kept(), torch.no_grad():  # the first use of the compiler turns off validation
            fast = _inductor(graph, [tensor.contiguous() for tensor in example])

        def run(*tensors: Tensor) -> Outputs:
            with torch.no_grad():
                return fast(*[tensor.contiguous() for tensor in tensors])

        run(*example)
        return run
    except Exception as error:  # no C++ compiler, an operator without lowering, …
        _warn("compiled", error)
        return _without_python(graph, *example)


def _inductor(graph: GraphModule, inputs: list[Tensor]) -> TensorFunction:
    """The graph as compiled by inductor, or as found in its cache.

    The graph is passed to inductor directly: `torch.compile` would trace it again and check its inputs before every
    call, which takes as long as the arithmetic of a hundred lanes. Without a tracing context that has a `ShapeEnv`,
    inductor neither reads nor writes its cache.
    """
    from torch._inductor.compile_fx import compile_fx  # importing it takes two seconds

    options = {"fallback_random": True}  # use torch's random numbers
    with _without_collection(), tracing(TracingContext(FakeTensorMode(shape_env=ShapeEnv()))):
        return cast("TensorFunction", compile_fx(graph, inputs, config_patches=options, ignore_shape_env=True))


def _graph(function: TensorFunction, *example: Tensor) -> GraphModule | None:
    try:
        shapes = tracing(TracingContext(FakeTensorMode(allow_fallback_kernels=True)))  # else made anew by each operator
        with recording(), pyro.validation_enabled(False), torch.enable_grad(), _without_collection(), shapes:
            return simplify(make_fx(function)(*example))
    except Exception as error:  # a user's program may make the tracer raise anything
        _warn("recorded", error)
        return None


def _without_python(graph: GraphModule, *example: Tensor) -> TensorFunction:
    """The graph in TorchScript, which takes a third of Python's time per operator; the graph itself if that fails."""
    try:
        with warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore")  # the tracer is deprecated for programs, but this is a flat graph
            return torch.jit.trace(graph, example, check_trace=False)
    except Exception:
        return graph


def _warn(what: str, error: Exception) -> None:
    first = (str(error).strip() or type(error).__name__).splitlines()[0]
    warn(f"the program could not be {what} and runs more slowly: {first[:200]}", RuntimeWarning)


@contextmanager
def _without_collection() -> Iterator[None]:
    """Pause Python's search for reference cycles, which takes more than half of the time of tracing and compiling."""
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()


@contextmanager
def _quiet() -> Iterator[None]:
    """Suppress the messages of the compiler, since a failure is reported in one warning."""
    loggers = [logging.getLogger(name) for name in ("torch._dynamo", "torch._inductor", "torch.utils.cpp_extension")]
    levels: list[Any] = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)

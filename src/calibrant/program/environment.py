"""Device, dtype, random state and validation: set for one call and restored after it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributions import Distribution
from torch.func import functional_call

from calibrant.calls import parameters_in_modules
from calibrant.program.contract import Program, Values, as_program


def in_double(module: Program) -> Program:
    """The model or guide as a function that runs in float64 on copies of its weights and buffers.

    The module and its buffers are never changed, and no gradient reaches its weights.
    """
    program = as_program(module)
    copied = on_tensors(program, {name: _copy_in_double(tensor.detach()) for name, tensor in _state(program)})

    def run(*args: Any, **kwargs: Any) -> Any:
        with parameters_in_modules():
            return copied(*args, **kwargs)

    return run


def on_tensors(module: nn.Module, tensors: Values) -> Program:
    """A module as a function that runs on other tensors than its own, which it has again afterwards.

    `functional_call` leaves a module that is reached by several names with the other tensors, and needs every name of
    a weight that several modules share; here each module is named once, and all its weights are replaced.

    Args:
        module: the module; it is not changed.
        tensors: name of a parameter or buffer, as torch lists them → its replacement.
    """
    own = {id(tensor): name for name, tensor in _state(module)}
    held = {
        f"{path}.{name}" if path else name: tensors[own[id(tensor)]]
        for path, part in module.named_modules()
        for name, tensor in (*part._parameters.items(), *part._buffers.items())
        if own.get(id(tensor)) in tensors
    }
    return lambda *args, **kwargs: functional_call(module, held, args, kwargs, tie_weights=False)


def _copy_in_double(tensor: Tensor) -> Tensor:
    return tensor.to(torch.float64 if tensor.is_floating_point() else tensor.dtype, copy=True)


def cast(values: Values, device: torch.device, dtype: torch.dtype) -> dict[str, Tensor]:
    """The values on a device; floating-point tensors are cast to `dtype`, integer tensors keep theirs."""
    return {n: v.to(device, dtype if v.is_floating_point() else v.dtype) for n, v in values.items()}


def _state(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    yield from module.named_parameters()
    yield from module.named_buffers()


@contextmanager
def defaults(
    model: Program, values: Values, dtype: torch.dtype | None = None
) -> Iterator[tuple[torch.device, torch.dtype]]:
    """Set default device and dtype for a call to those of the model's weights, or of the values if it has none."""
    weights = [tensor for _, tensor in _state(model)] if isinstance(model, nn.Module) else []
    tensors = [*weights, *values.values()]
    floating = [tensor for tensor in tensors if tensor.is_floating_point()]
    before_device, before = torch.get_default_device(), torch.get_default_dtype()
    device = next((tensor.device for tensor in (*floating, *tensors)), before_device)
    dtype = dtype or next((tensor.dtype for tensor in floating), before)
    torch.set_default_dtype(dtype)
    try:
        with nullcontext() if device == before_device else device:
            yield device, dtype
    finally:
        torch.set_default_dtype(before)


@contextmanager
def validation_kept() -> Iterator[None]:
    """Restore torch's global setting for the validation of distributions, which some imports and compilers change."""
    before = Distribution._validate_args
    try:
        yield
    finally:
        Distribution.set_default_validate_args(before)


@contextmanager
def seeded(seed: int | None) -> Iterator[None]:
    """Seed the draws inside, and leave the random state outside unchanged; None draws from the global state."""
    if seed is None:
        yield
        return
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        yield


_recordings: list[None] = []  # one for each recording that is going on


@contextmanager
def recording() -> Iterator[None]:
    """Say that what runs inside is recorded as a graph, where no control flow may depend on values.

    Distributions do not validate values inside, not even those that were made elsewhere, with validation on.
    """
    validate = Distribution._validate_sample
    Distribution._validate_sample = _accept  # type: ignore[method-assign, assignment]
    _recordings.append(None)
    try:
        yield
    finally:
        _recordings.pop()
        Distribution._validate_sample = validate  # type: ignore[method-assign]


def _accept(distribution: Distribution, value: Tensor) -> None:
    """Validate nothing."""


def is_recording() -> bool:
    """Whether a graph is recorded of what runs now."""
    return bool(_recordings)

"""Checks of the modules of a program or guide: tensors that would not follow a change of device, and layers that are
random or mix data."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.dropout import _DropoutNd
from torch.nn.parameter import is_lazy

from calibrant.errors import ProgramError


def check_modules(program: nn.Module) -> None:
    """Refuse tensors that are not buffers, weights without a shape, and layers that are random or mix data.

    Raises:
        ProgramError: naming the attribute, parameter or layer, and the remedy.
    """
    for path, module in program.named_modules():
        for name, value in vars(module).items():
            if isinstance(value, Tensor):
                raise ProgramError(
                    f"attribute {dotted(path, name)!r} is a tensor but not a buffer, so it would not move to another "
                    f'device or dtype: self.register_buffer("{name}", tensor)'
                )
    if lazy := [name for name, weight in program.named_parameters() if is_lazy(weight)]:
        raise ProgramError(f"parameters {lazy} have no shape yet: give it in __init__, without lazy modules")
    if random := [name for name, module in program.named_modules() if _is_random(module)]:
        raise ProgramError(f"{random} are in training mode, where they are random or mix data: call .eval() first")
    if batch := [name for name, module in program.named_modules() if _is_batch_norm(module)]:
        raise ProgramError(f"{batch} use batch statistics in eval() too: let them track running statistics")


def _is_random(module: nn.Module) -> bool:
    dropout = isinstance(module, _DropoutNd) and module.p > 0
    return module.training and (dropout or isinstance(module, _BatchNorm))


def _is_batch_norm(module: nn.Module) -> bool:
    return isinstance(module, _BatchNorm) and module.running_mean is None


def dotted(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name


@contextmanager
def buffers_kept(program: nn.Module) -> Iterator[None]:
    """Restore the buffers of a program afterwards, since some modules count their calls in training mode."""
    before = {name: buffer.clone() for name, buffer in program.named_buffers()}
    try:
        yield
    finally:
        for name, buffer in program.named_buffers():
            if name in before:
                buffer.copy_(before[name])

"""Checks of the modules of a program or guide: tensors that would not follow a change of device, and layers that are
random or mix data."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from pyro.distributions.torch_transform import TransformModule
from pyro.nn.auto_reg_nn import ConditionalAutoRegressiveNN
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.dropout import _DropoutNd
from torch.nn.parameter import is_lazy
from torch.nn.utils.parametrizations import _SpectralNorm
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm
from torch.utils._pytree import tree_leaves

from calibrant.errors import ProgramError

Module = TypeVar("Module", bound=nn.Module)


def check_modules(program: nn.Module) -> None:
    """Refuse tensors that are not buffers, weights that cannot be used, and layers that are random or mix data.

    Raises:
        ProgramError: naming the attribute, parameter or layer, and the remedy.
    """
    for path, module in program.named_modules():
        for name in _plain_tensors(module):
            if not _is_of_library(module, name):
                raise ProgramError(
                    f"attribute {dotted(path, name)!r} is a tensor but not a buffer, so it would not move to another "
                    f'device or dtype: in place of self.{name} = tensor, write self.register_buffer("{name}", tensor)'
                )
    if lazy := [name for name, weight in program.named_parameters() if is_lazy(weight)]:
        raise ProgramError(f"parameters {lazy} have no shape yet: give it in __init__, without lazy modules")
    _check_weights(program)
    if random := [name for name, module in program.named_modules() if _is_random(module)]:
        raise ProgramError(f"{random} are in training mode, where they are random or mix data: call .eval() first")
    if batch := [name for name, module in program.named_modules() if _is_batch_norm(module)]:
        raise ProgramError(f"{batch} use batch statistics in eval() too: let them track running statistics")


def _check_weights(program: nn.Module) -> None:
    weights = [(name, part) for name, part in program.named_parameters() if part.is_floating_point()]
    for name, weight in (*weights, *program.named_buffers()):
        if weight.device.type == "meta":
            raise ProgramError(f"{name!r} is on the device 'meta', where it has no values: build the module on another")
        if weight.is_inference():
            raise ProgramError(
                f"{name!r} was made inside torch.inference_mode(), so that nothing can be differentiated through it: "
                "build the module outside"
            )
    if narrow := [name for name, weight in weights if weight.dtype not in (torch.float32, torch.float64)]:
        raise ProgramError(
            f"{narrow[0]!r} has the dtype {_dtype(dict(weights)[narrow[0]])}, in which no density is accurate: call "
            ".float() on the module first"
        )
    if other := [(name, weight) for name, weight in weights if weight.dtype != weights[0][1].dtype]:
        pair = [f"{name!r} has the dtype {_dtype(weight)}" for name, weight in (weights[0], other[0])]
        raise ProgramError(f"{' and '.join(pair)}: call .float() or .double() on the whole module, so that all agree")


def check_same_dtype(model: nn.Module, guide: nn.Module) -> None:
    """Refuse a guide whose weights have another dtype than those of its model.

    Raises:
        ProgramError: naming both dtypes.
    """
    dtypes = [next((_dtype(w) for w in part.parameters() if w.is_floating_point()), "") for part in (model, guide)]
    if all(dtypes) and dtypes[0] != dtypes[1]:
        raise ProgramError(
            f"its weights have the dtype {dtypes[1]}, and those of the model {dtypes[0]}: call "
            f".{'double' if dtypes[0] == 'float64' else 'float'}() on the guide"
        )


def _dtype(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def _plain_tensors(module: nn.Module) -> dict[str, Tensor]:
    return {name: value for name, value in vars(module).items() if isinstance(value, Tensor)}


def _is_of_library(module: nn.Module, name: str) -> bool:
    """Whether torch or Pyro keeps a tensor: computed from weights at each run, or a constant that no run reads."""
    computed = any(isinstance(hook, WeightNorm | SpectralNorm) and hook.name == name for hook in _hooks(module))
    cached = isinstance(module, TransformModule) and name.startswith("_cache")
    return computed or cached or (isinstance(module, ConditionalAutoRegressiveNN) and name == "mask_skip")


def _hooks(module: nn.Module) -> list[Any]:
    return list(module._forward_pre_hooks.values())


def copied(module: Module) -> Module:
    """A deep copy of a module, also where torch or Pyro keeps computed tensors in it, which refuse to be copied."""
    held = [leaf for part in module.modules() for leaf in tree_leaves(list(vars(part).values()))]
    computed = [leaf for leaf in held if isinstance(leaf, Tensor) and leaf.grad_fn is not None]
    return copy.deepcopy(module, {id(value): value.detach().clone() for value in computed})


@contextmanager
def unchanging(module: nn.Module) -> Iterator[None]:
    """Let no training change a module: its weights get no gradients, and it stays in `eval()`, without dropout and new
    batch statistics."""
    trained = [weight for weight in module.parameters() if weight.requires_grad]
    module.requires_grad_(False).eval()
    module.train = lambda mode=True: module  # type: ignore[method-assign]
    try:
        yield
    finally:
        del module.train
        for weight in trained:
            weight.requires_grad_(True)


def settled_parts(program: nn.Module) -> dict[str, Any]:
    """The modules that take their noise scale from the whole training set, and in `train()` from a minibatch."""
    return {name: module for name, module in program.named_modules() if _settles_noise(module)}


def is_frozen(module: nn.Module) -> bool:
    """Whether a module has weights, none of which is trained."""
    weights = list(module.parameters())
    return bool(weights) and not any(weight.requires_grad for weight in weights)


def _settles_noise(module: nn.Module) -> bool:
    return hasattr(type(module), "settle_noise")


def _is_random(module: nn.Module) -> bool:
    dropout = isinstance(module, _DropoutNd) and module.p > 0
    spectral = isinstance(module, _SpectralNorm) or any(isinstance(hook, SpectralNorm) for hook in _hooks(module))
    return module.training and (dropout or spectral or isinstance(module, _BatchNorm) or _settles_noise(module))


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

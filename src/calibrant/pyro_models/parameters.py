"""The parameters of an ordinary Pyro model: those of `pyro.param`, and the modules that it uses."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from types import CodeType, FunctionType, MethodType
from typing import Any

import pyro
import torch
from pyro.poutine.messenger import Messenger
from torch import Tensor, nn
from torch.distributions import constraints, transform_to

from calibrant.errors import ProgramError
from calibrant.program.contract import Program, as_program
from calibrant.program.environment import on_tensors

OF_MODULE = "$$$"  # in the names of parameters that pyro.module registers


@dataclass(frozen=True)
class Param:
    """A `pyro.param` statement: its value, and its constraint."""

    value: Tensor
    constraint: constraints.Constraint


class Recorder(Messenger):
    """Notes the parameters of a run: those of `pyro.param` by name, and the weights that `pyro.module` registers."""

    def __init__(self) -> None:
        super().__init__()
        self.found: dict[str, Param] = {}
        self.weights: dict[str, Tensor] = {}
        store = pyro.get_param_store()
        self.trained = {name: value.detach().clone() for name, value in store.items()}

    def _pyro_param(self, msg: Any) -> None:
        name, args = msg["name"], msg["args"]
        if OF_MODULE in name and len(args) > 1:
            self.weights[name.partition(OF_MODULE)[0]] = msg["value"] = args[1]
        elif len(args) > 1 and name not in self.found:
            start = self.trained[name] if name in self.trained else args[1]() if callable(args[1]) else args[1]
            constraint = msg["kwargs"].get("constraint") or constraints.real
            self.found[name] = Param(torch.as_tensor(start).detach().clone(), constraint)
        if name in self.found:
            msg["value"] = self.found[name].value


class Parameters(nn.Module):
    """Parameters of `pyro.param` statements, unconstrained.

    A parameter has its name in the model, with underscores for dots.
    """

    def __init__(self, found: Mapping[str, Param]) -> None:
        super().__init__()
        self._keys = {name: name.replace(".", "_") for name in found}
        self._constraints = {name: one.constraint for name, one in found.items()}
        self.unconstrained = nn.ParameterDict(
            {self._keys[name]: nn.Parameter(transform_to(one.constraint).inv(one.value)) for name, one in found.items()}
        )

    def value(self, name: str) -> Tensor | None:
        """The present value of a parameter; None for one that no pyro.param statement makes."""
        if name not in self._keys:
            return None
        return transform_to(self._constraints[name])(self.unconstrained[self._keys[name]])


class OutsideModules(nn.Module):
    """Modules that a model finds by itself, as variables outside; a copy lets the model run with its own weights."""

    def __init__(self, modules: Sequence[nn.Module]) -> None:
        super().__init__()
        self.all = nn.ModuleList(modules)
        self._own = _Kept(tuple(modules))

    def run(self, function: Callable[[], Any]) -> Any:
        """Call a function that uses the modules."""
        if all(mine is own for mine, own in zip(self.all, self._own.modules, strict=True)):
            return function()
        tensors = {f"all.{name}": part for name, part in (*self.all.named_parameters(), *self.all.named_buffers())}
        return on_tensors(_Run(self._own.modules, function), tensors)()


@dataclass(frozen=True)
class _Kept:
    """Modules that stay the same in a copy, since a function that is copied still finds them."""

    modules: tuple[nn.Module, ...]

    def __deepcopy__(self, memo: dict[int, Any]) -> _Kept:
        return self


class _Run(nn.Module):
    def __init__(self, modules: Sequence[nn.Module], function: Callable[[], Any]) -> None:
        super().__init__()
        self.all = nn.ModuleList(modules)
        self.function = function

    def forward(self) -> Any:
        return self.function()


def modules_outside(model: Program, registered: Mapping[str, Tensor]) -> list[nn.Module]:
    """The modules that a model uses as variables from outside: of functions around it, and of its file.

    Args:
        model: the model; its own modules are not among them.
        registered: name in `pyro.module` → one of the weights of this module.

    Raises:
        ProgramError: for a module that pyro.module registers and that is found nowhere.
    """
    own = as_program(model)
    found = {id(value): value for value in _reached(model) if isinstance(value, nn.Module)}
    within = {id(part) for module in found.values() for part in module.modules() if part is not module}
    within |= {id(part) for part in own.modules()}
    outside = [module for key, module in found.items() if key not in within]
    weights = {id(weight) for module in (own, *outside) for weight in module.parameters()}
    if lost := [name for name, weight in registered.items() if id(weight) not in weights]:
        raise ProgramError(
            f"pyro.module is called for {lost}, which are no variables that the model itself uses: make the model a "
            "method of a module, class Model(nn.Module), with these modules as attributes"
        )
    return outside


def _reached(model: Program) -> Iterator[Any]:
    """The values of outside variables of a function, and of the functions of the same file that it calls."""
    waiting: list[Any] = [model]
    seen: set[int] = set()
    while waiting:
        part = waiting.pop()
        if id(part) in seen:
            continue
        seen.add(id(part))
        yield part
        if isinstance(part, MethodType):
            waiting += [part.__self__, part.__func__]
        elif isinstance(part, FunctionType):
            waiting += _variables(part)
        elif isinstance(part, partial):
            waiting += [part.func, *part.args]


def _variables(function: FunctionType) -> list[Any]:
    """Values of the closure of a function, and modules and functions of its file that its code names."""
    own = [cell.cell_contents for cell in function.__closure__ or () if not _is_empty(cell)]
    named = [function.__globals__.get(name) for name in _names(function.__code__)]
    local = [
        value
        for value in named
        if isinstance(value, nn.Module) or (isinstance(value, FunctionType) and value.__module__ == function.__module__)
    ]
    behind = getattr(function, "__wrapped__", None)
    return [*own, *local, *([behind] if behind is not None else [])]


def _is_empty(cell: Any) -> bool:
    try:
        cell.cell_contents  # noqa: B018
    except ValueError:
        return True
    return False


def _names(code: CodeType) -> Iterator[str]:
    yield from code.co_names
    for part in code.co_consts:
        if inspect.iscode(part):
            yield from _names(part)

"""What a program is, and how it is called."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import ExitStack
from functools import partial
from types import MethodType
from typing import Any

from pyro.nn import PyroModule
from pyro.poutine.messenger import Messenger
from torch import Tensor, nn

from calibrant.errors import DataError, ProgramError

PLATE = "data"
Values = Mapping[str, Tensor]
Program = Callable[..., Any]


class _Function(PyroModule):
    """Wraps a plain function, or an `nn.Module` that is not a `PyroModule`, as a `PyroModule`.

    A module behind the function (`vae.model`, `poutine.reparam(model, ...)`) becomes a part of it; the names of its
    sites do not change.
    """

    def __init__(self, function: Program) -> None:
        super().__init__()
        self.function = function
        for module in _modules_behind(function):
            nn.Module.add_module(self, "owner", module)  # PyroModule's own method would rename the sites of its weights

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        with ExitStack() as contexts:
            if isinstance(owner := self._modules.get("owner"), PyroModule):
                contexts.enter_context(owner._pyro_context)  # a method is called without it
            return self.function(*args, **kwargs)


def _bare(function: Program) -> Program:
    """A program without the handlers of Pyro around it, such as `poutine.reparam` and `config_enumerate`."""
    while True:
        if isinstance(function, partial) and function.args and isinstance(function.args[0], Messenger):
            _, inner, *first = function.args
            function = partial(inner, *first, **function.keywords) if first or function.keywords else inner
        elif hasattr(function, "__wrapped__"):
            function = function.__wrapped__
        else:
            return function


def _modules_behind(function: Program) -> Iterator[nn.Module]:
    """The module of which a function is a method, or around which it is a handler or a partial; at most one."""
    bare = _bare(function)
    first = (bare.func, *bare.args[:1]) if isinstance(bare, partial) else (bare,)
    parts = (part.__self__ if isinstance(part, MethodType) else part for part in first)
    yield from [part for part in parts if isinstance(part, nn.Module) and part is not function][:1]


def as_program(model: Program) -> PyroModule:
    """Return the model (or guide) as a `PyroModule`; a plain function is wrapped in one.

    Raises:
        ProgramError: for a class or an object that cannot be called.
    """
    if isinstance(model, type):
        raise ProgramError(f"{model.__name__} is a class: give an instance, {model.__name__}(...)")
    if not isinstance(model, PyroModule):
        if not callable(model):
            raise ProgramError(f"a model is a PyroModule or a function of size, not {type(model).__name__}")
        return _Function(model)
    return model


def covariate_names(model: Program) -> tuple[str, ...]:
    """Names of the covariates that a program takes, which are its arguments after `size`."""
    return tuple(p.name for p in arguments(as_program(model))[1:] if p.kind is not p.VAR_KEYWORD)


def arguments(program: PyroModule) -> list[inspect.Parameter]:
    """The arguments of a program, `size` first; a program may tell them by `__signature__`."""
    if (told := getattr(program, "__signature__", None)) is not None:
        return list(told.parameters.values())
    target = _bare(program.function if isinstance(program, _Function) else program.forward)
    target = _bare(target.forward) if isinstance(target, nn.Module) else target
    return list(inspect.signature(target).parameters.values())


def check_values(observed: Values, covariates: Values) -> None:
    """Refuse observations and covariates of different lengths, and values that are not finite."""
    if not observed:
        raise DataError("there are no observations: give observed={site: tensor}")
    values = {**observed, **covariates}
    for name, value in values.items():
        if not isinstance(value, Tensor) or not value.dim():
            raise DataError(f"{name!r} must be a tensor with leading dimension data")
        if value.is_meta:
            raise DataError(f"{name!r} is on the device 'meta', where it has no values: make it on another device")
        if not value.isfinite().all():
            row = int((~value.isfinite()).reshape(len(value), -1).any(1).nonzero()[0])
            raise DataError(
                f"{name!r} is not finite at datum {row}: drop it, or mask it (a covariate as mask, and any value "
                "inside the support in the masked entries)"
            )
    lengths = {name: len(value) for name, value in values.items()}
    if len(set(lengths.values())) > 1 or 0 in lengths.values():
        raise DataError(
            f"leading dimensions {lengths}: all observations and covariates need the same number of data, at least one"
        )


def check_arguments(program: PyroModule, covariates: Values) -> None:
    """Refuse a program that does not take the number of data and these covariates.

    Raises:
        ProgramError: for arguments that no program has.
        DataError: for covariates that are missing or unknown.
    """
    module = program.function if isinstance(program, _Function) else program
    if isinstance(module, nn.Module) and type(module).forward is nn.Module.forward:
        raise ProgramError(f"{type(module).__name__} has no forward: give one of its methods, such as its .model")
    given = arguments(program)
    if not given or given[0].name in covariates:
        raise size_error(program, covariates)
    if given[0].name == "observed":
        raise ProgramError(
            f"{type(module).__name__} takes the observed data, as a guide does, and stands where the model is wanted: "
            "give the model first, then its guide"
        )
    if any(p.kind is p.VAR_KEYWORD for p in given):
        raise ProgramError(f"the program takes **{given[-1].name}: name each covariate, def forward(self, size, label)")
    names = {p.name for p in given[1:]}
    if missing := {p.name for p in given[1:] if p.default is p.empty} - set(covariates):
        found = f" (given: {sorted(covariates)})" if covariates else ""
        raise DataError(
            f"the program takes the covariates {sorted(missing)}, which were not given{found}: covariates={{...}}"
        )
    if unknown := set(covariates) - names:
        raise DataError(f"the program takes no covariates {sorted(unknown)}; its own are {sorted(names)}")


def check_not_arguments(program: PyroModule, observed: Collection[str], covariates: Collection[str]) -> None:
    """Refuse a program that takes what is observed as an argument, `model(size, x, y=None)` with `obs=y`.

    Raises:
        ProgramError: naming the arguments.
    """
    if set(observed) & set(covariate_names(program)):
        raise size_error(program, covariates)


def size_error(program: PyroModule, covariates: Collection[str], reason: str = "") -> ProgramError:
    """The error for a program that takes its data where the number of data belongs."""
    given = arguments(program)
    found = "(" + ", ".join(argument.name for argument in given) + ")"
    inputs = "".join(f", {argument.name}" for argument in given if argument.name in covariates)
    is_function = isinstance(program, _Function) and not program._modules
    head = f"def model({'' if is_function else 'self, '}size{inputs})"
    return ProgramError(
        f"a program takes the number of data as its first argument and never sees observations, but this one takes "
        f'{found}{reason}: write {head} with pyro.plate("{PLATE}", size) and no obs=; observations are given as '
        "observed={site: tensor}, and inputs, the arguments after size, as covariates={argument: tensor}; or keep the "
        f"model as it is, calibrant.from_pyro(model, {', '.join(argument.name for argument in given)})"
    )

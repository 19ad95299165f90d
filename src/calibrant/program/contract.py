"""What a program is, and how it is called."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

from pyro.nn import PyroModule
from torch import Tensor, nn

from calibrant.errors import DataError, ProgramError

PLATE = "data"
Values = Mapping[str, Tensor]
Program = Callable[..., Any]


class _Function(PyroModule):
    """Wraps a plain function, or an `nn.Module` that is not a `PyroModule`, as a `PyroModule`."""

    def __init__(self, function: Program) -> None:
        super().__init__()
        self.function = function

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.function(*args, **kwargs)


def as_program(model: Program) -> PyroModule:
    """Return the model (or guide) as a `PyroModule`; a plain function is wrapped in one.

    Raises:
        ProgramError: for an object that cannot be called, or a PyroModule that was built before `import calibrant`.
    """
    if not isinstance(model, PyroModule):
        if not callable(model):
            raise ProgramError(f"a model is a PyroModule or a function of size, not {type(model).__name__}")
        return _Function(model)
    if not hasattr(model._pyro_context, "param_state"):
        raise ProgramError(
            f"{type(model).__name__} was built before `import calibrant`, which makes Pyro keep parameters in their "
            "module: import calibrant first, then build the model"
        )
    return model


def covariate_names(model: Program) -> tuple[str, ...]:
    """Names of the covariates that a program takes, which are its arguments after `size`."""
    return tuple(p.name for p in arguments(as_program(model))[1:] if p.kind is not p.VAR_KEYWORD)


def arguments(program: PyroModule) -> list[inspect.Parameter]:
    """The arguments of a program, `size` first."""
    target = program.function if isinstance(program, _Function) else program.forward
    target = target.forward if isinstance(target, nn.Module) else target
    return list(inspect.signature(target).parameters.values())


def check_values(observed: Values, covariates: Values) -> None:
    """Refuse observations and covariates of different lengths, and values that are not finite."""
    if not observed:
        raise DataError("there are no observations: give observed={site: tensor}")
    values = {**observed, **covariates}
    for name, value in values.items():
        if not isinstance(value, Tensor) or not value.dim():
            raise DataError(f"{name!r} must be a tensor with leading dimension data")
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
    given = arguments(program)
    if not given:
        raise ProgramError("a program takes the number of data as its first argument: def forward(self, size, ...)")
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

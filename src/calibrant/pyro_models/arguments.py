"""The arguments of an ordinary Pyro model: which hold data, in which dimension, and which of these are observed."""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor

from calibrant.errors import DataError, ProgramError
from calibrant.program.contract import Program, arguments, as_program

_MOST_GUESSES = 32  # assignments of dimensions that are tried


@dataclass(frozen=True)
class Role:
    """What an argument of a model is.

    Attributes:
        kind: "covariate", one entry for each datum, which the program takes; "observed", data of sites with obs=, which
            the program never sees; "size", the number of data; or "constant".
        dim: the dimension of the data, from the left.
    """

    kind: str
    dim: int = 0


Roles = Mapping[str, Role]


def bound(model: Program, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of a call of a model by name; those without a value are None.

    Raises:
        ProgramError: for a model whose arguments have no names, and for a call without any of its arguments.
        DataError: for arguments that the model does not take, and for a dict or an array of numpy.
    """
    parameters = [p for p in arguments(as_program(model)) if p.kind is not p.VAR_KEYWORD]
    names = [p.name for p in parameters]
    if any(p.kind is p.VAR_POSITIONAL for p in parameters):
        raise ProgramError("the model takes *args: name its arguments, as in def model(x, y=None)")
    try:
        given = inspect.Signature(parameters).bind_partial(*args, **kwargs).arguments
    except TypeError as error:
        raise DataError(f"the model takes the arguments ({', '.join(names)}): {error}") from error
    needed = [p.name for p in parameters if p.default is p.empty]
    if needed and not given:
        raise ProgramError(
            f"the model takes ({', '.join(names)}), and is run once to see what it does: give what you give to "
            f"svi.step or mcmc.run, cal.from_pyro(model, {', '.join(needed)})"
        )
    values = {p.name: given.get(p.name, None if p.default is p.empty else p.default) for p in parameters}
    for name, value in values.items():
        _check_kind(name, value)
    return values


def _check_kind(name: str, value: Any) -> None:
    if isinstance(value, np.ndarray):
        raise DataError(f"the argument {name!r} is an array of numpy: give a tensor, torch.as_tensor({name})")
    parts = value.values() if isinstance(value, Mapping) else value if isinstance(value, list | tuple) else ()
    if any(isinstance(part, Tensor) for part in parts):
        raise ProgramError(
            f"the argument {name!r} is a {type(value).__name__} of tensors: let the model take each of them by name, "
            "as in def model(x, y=None)"
        )


def guesses(
    values: Mapping[str, Any], observed: Collection[str], count: int, covariates: Collection[str] | None
) -> Iterator[dict[str, Role]]:
    """The possible roles of all arguments, the likeliest ones first.

    Args:
        values: the arguments of a call.
        observed: the arguments that are observed.
        count: number of data of this call.
        covariates: the arguments that are covariates; None for all tensors with a dimension of this size.

    Raises:
        DataError: for a covariate that the model does not take, or that has no dimension of this size.
    """
    for name in covariates or ():
        if not isinstance(values.get(name), Tensor) or count not in values[name].shape:
            found = f"is no argument of the model, which takes {list(values)}"
            if name in values:
                found = f"has no dimension of size {count}, the number of data"
            raise DataError(f"the covariate {name!r} {found}")
    options = {name: _options(name, value, observed, count, covariates) for name, value in values.items()}
    for roles in itertools.islice(itertools.product(*options.values()), _MOST_GUESSES):
        yield dict(zip(options, roles, strict=True))


def _options(
    name: str, value: Any, observed: Collection[str], count: int, covariates: Collection[str] | None
) -> list[Role]:
    if isinstance(value, Tensor):
        dims = [dim for dim, size in enumerate(value.shape) if size == count]
        if name in observed:
            return [Role("observed", dim) for dim in dims] or [Role("constant")]
        if covariates is not None:
            return [Role("covariate", dim) for dim in dims] if name in covariates else [Role("constant")]
        return [*(Role("covariate", dim) for dim in dims), Role("constant")]
    if isinstance(value, int) and not isinstance(value, bool) and value == count:
        return [Role("size"), Role("constant")]
    return [Role("constant")]

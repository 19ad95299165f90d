"""The registry of likelihoods: each file of this folder registers its own."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

from torch import nn

from calibrant.errors import ProgramError
from calibrant.models.parts.likelihoods.protocol import Likelihood
from calibrant.registries import Case, Registry

Class = TypeVar("Class", bound=type[Likelihood])


@dataclass(frozen=True)
class LikelihoodCard:
    """The description of a registered likelihood.

    Attributes:
        name: name that users give.
        cls: class of the likelihood.
        density_of: the values that it is a density of, such as "real numbers" or "the grey values 0 to 255".
        equations: the density, in one line.
        paper: source of the likelihood; empty for well-known distributions.
        cases: example constructions, on which all tests of likelihoods run. One of them has observations of a single
            entry.
    """

    name: str
    cls: type[Likelihood]
    density_of: str
    equations: str
    paper: str
    cases: tuple[Case, ...]


LIKELIHOODS: Registry[LikelihoodCard] = Registry(
    "likelihood", ProgramError, 'For a squared error: "beta". A likelihood of yours: a module.'
)


def register_likelihood(
    name: str, *, density_of: str, equations: str, paper: str = "", cases: tuple[Case, ...] = ()
) -> Callable[[Class], Class]:
    """Class decorator that makes a likelihood known by name; the arguments are the attributes of `LikelihoodCard`.

    Raises:
        ProgramError: for a name that another class has.
    """

    def register(cls: Class) -> Class:
        LIKELIHOODS.add(name, LikelihoodCard(name, cls, density_of, equations, paper, cases), cls)
        return cls

    return register


def list_likelihoods(pattern: str = "*") -> list[LikelihoodCard]:
    """Cards of the registered likelihoods whose names match a shell pattern, sorted by name."""
    return [LIKELIHOODS[name] for name in LIKELIHOODS.names(pattern)]


def make_likelihood(likelihood: str | Mapping[str, Any] | nn.Module, shape: tuple[int, ...] | None = None) -> nn.Module:
    """Build a likelihood from its name or from `{"name": …, **arguments}`; a module is returned unchanged.

    Args:
        likelihood: name, name and arguments, or module.
        shape: event shape of the observations, for a likelihood that has parameters of its own for some entries: the
            argument `per` says for which, and a `shape` beside it is not needed.

    Raises:
        ProgramError: for an unknown name or argument.
    """
    if isinstance(likelihood, nn.Module):
        return likelihood
    arguments: dict[str, Any] = {"name": likelihood} if isinstance(likelihood, str) else dict(likelihood)
    if "name" not in arguments:
        raise ProgramError(f"likelihood={arguments!r} lacks the name: give {{'name': …, **arguments}}")
    name = str(arguments.pop("name"))
    cls = LIKELIHOODS[name].cls
    if shape is not None and "per" in arguments and "shape" in inspect.signature(cls).parameters:
        arguments.setdefault("shape", shape)
    try:
        return cls(**arguments)
    except TypeError as error:
        wanted = ", ".join(inspect.signature(cls).parameters) or "none"
        raise ProgramError(
            f"likelihood {name!r}: {error}; its arguments are: {wanted}. Give them beside the name, as in "
            f'likelihood={{"name": "{name}", ARGUMENT: VALUE}}'
        ) from error

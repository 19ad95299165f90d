"""The registry of methods: each file of this folder registers its own."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

from calibrant.errors import ProgramError
from calibrant.models.registry import check_values, constructor_arguments, list_models
from calibrant.program.environment import seeded
from calibrant.registries import Registry
from calibrant.representations.learners.learner import Learner, Plan
from calibrant.representations.learners.trunks import Inputs

_SET = {  # arguments of models that a method sets itself
    "shape": ", which is that of the data",
    "classes": ", which are those of the data",
    "encoder": ", which is made of trunk= and backbone=",
}
Class = TypeVar("Class", bound=type[Learner])


@dataclass(frozen=True)
class MethodCard:
    """The description of a registered method.

    Attributes:
        name: name that users give.
        cls: class of the method.
        paper: where the method comes from.
        about: what is trained, and on which loss, in one line.
        unit: what its uncertainty is, with the unit.
        plan: how it is trained unless the call says otherwise.
    """

    name: str
    cls: type[Learner]
    paper: str
    about: str
    unit: str
    plan: Plan


METHODS: Registry[MethodCard] = Registry("method", ProgramError, "Give one of these names.")


def register_method(
    name: str, *, paper: str, about: str, unit: str, plan: Plan | None = None
) -> Callable[[Class], Class]:
    """Class decorator that makes a method known by name; the arguments are the attributes of `MethodCard`.

    Raises:
        ProgramError: for a name that another class has.
    """

    def register(cls: Class) -> Class:
        METHODS.add(name, MethodCard(name, cls, paper, about, unit, plan or Plan()), cls)
        return cls

    return register


def methods(pattern: str = "*") -> list[str]:
    """Names of the registered methods that match a shell pattern, sorted."""
    return METHODS.names(pattern)


def method_card(name: str) -> MethodCard:
    """The card of a registered method.

    Raises:
        ProgramError: for an unknown name, with the nearest ones.
    """
    return METHODS[name]


def _own_arguments(card: MethodCard) -> list[str] | None:
    """Arguments that users may give: those of the class, and of a program, those of the model of the same name.

    None where any argument may be given: a class with `**arguments` that are not those of a model.
    """
    _, *parameters = inspect.signature(card.cls).parameters.values()
    named = [parameter.name for parameter in parameters if parameter.kind != parameter.VAR_KEYWORD]
    if len(named) == len(parameters):
        return named
    if card.name not in list_models():
        return None
    return named + [name for name in constructor_arguments(card.name) if name not in (*named, *_SET, "latents")]


def build(card: MethodCard, inputs: Inputs, arguments: Mapping[str, Any], seed: int) -> Learner:
    """The untrained networks of a method.

    Raises:
        ProgramError: for arguments that the method does not take.
    """
    own = _own_arguments(card)
    if own is not None and (unknown := [name for name in arguments if name not in own]):
        raise ProgramError(
            f"{card.name} takes no argument {unknown[0]!r}{_SET.get(unknown[0], '')}; its own arguments are: "
            f"{', '.join(own) or 'none'}"
        )
    try:
        inspect.signature(card.cls).bind(inputs, **arguments)
    except TypeError as error:
        raise ProgramError(f"{card.name}: {error}") from error
    check_values(card.name, card.cls, arguments)
    with seeded(seed):
        return card.cls(inputs, **arguments)

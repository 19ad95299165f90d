"""The registry of models: each file of this folder registers its own."""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

from pyro.nn import PyroModule
from torch import Tensor, nn

from calibrant.errors import ProgramError
from calibrant.registries import Case, Registry
from calibrant.userfile import is_user_spec, load_object

Model = TypeVar("Model", bound=type[PyroModule])


@dataclass(frozen=True)
class ModelCard:
    """The description of a registered model.

    Attributes:
        name: name that users give.
        cls: class of the model.
        paper: where the model comes from.
        equations: its generative equations, in one line.
        licence: licence of the code.
        cases: example constructions, on which all tests of models run.
    """

    name: str
    cls: type[PyroModule]
    paper: str
    equations: str
    licence: str
    cases: tuple[Case, ...]


@dataclass(frozen=True)
class Recipe:
    """What is needed to rebuild a model: a registered name or `FILE.py:Class`, and arguments in JSON form."""

    name: str
    arguments: dict[str, Any]
    sha256: str = ""


MODELS: Registry[ModelCard] = Registry("model", ProgramError, "A file of yours: FILE.py:Class")


def register_model(
    name: str, *, paper: str, equations: str, licence: str, cases: tuple[Case, ...] = ()
) -> Callable[[Model], Model]:
    """Class decorator that makes a model known by name to `create`, the command line and the tests.

    The arguments are the attributes of `ModelCard`.

    Raises:
        ProgramError: for a name that another class has.
    """

    def register(cls: Model) -> Model:
        MODELS.add(name, ModelCard(name, cls, paper, equations, licence, cases), cls)
        return cls

    return register


def list_models(pattern: str = "*") -> list[str]:
    """Names of the registered models that match a shell pattern, sorted."""
    return MODELS.names(pattern)


def card(name: str) -> ModelCard:
    """The card of a registered model.

    Raises:
        ProgramError: for an unknown name, with the nearest ones.
    """
    return MODELS[name]


def create(name: str, **arguments: Any) -> PyroModule:
    """Build a model from a registered name or `FILE.py:Class`.

    Name and arguments are kept in `model.recipe`, from which a run rebuilds the model. The recipe is None if an
    argument has no JSON form, such as a module; such a model is loaded with `load(run, model=…)`.

    Args:
        name: a name of `list_models()`, or `FILE.py:Class` for a model of your own.
        arguments: arguments of the constructor: numbers, strings, lists and dicts (tensors are stored as lists).

    Raises:
        ProgramError: for an unknown model, or arguments that its constructor does not take.
    """
    cls, sha256 = load_object(name) if is_user_spec(name) else (card(name).cls, "")
    if not (inspect.isclass(cls) and issubclass(cls, nn.Module)):
        raise ProgramError(f"{name} is not a PyroModule class: name a class that derives from pyro.nn.PyroModule")
    signature = inspect.signature(cls)
    try:
        signature.bind(**arguments)
    except TypeError as error:
        raise ProgramError(f"{name}: {error}; its arguments are {signature}") from error
    try:
        model: Any = cls(**arguments)
    except (TypeError, RuntimeError, ValueError, AttributeError) as error:
        raise (
            error if isinstance(error, ProgramError) else ProgramError(f"{name} could not be built: {error}")
        ) from error
    plain = _as_json(arguments)
    model.recipe = None if plain is None else Recipe(name, plain, sha256)
    return model


def constructor_arguments(name: str) -> tuple[str, ...]:
    """The argument names of a model's constructor."""
    cls = load_object(name)[0] if is_user_spec(name) else card(name).cls
    return tuple(inspect.signature(cls).parameters)


def _as_json(arguments: dict[str, Any]) -> dict[str, Any] | None:
    plain = {key: value.tolist() if isinstance(value, Tensor) else value for key, value in arguments.items()}
    try:
        return json.loads(json.dumps(plain))
    except TypeError:  # a module or function was passed: nothing on disk could rebuild it
        return None

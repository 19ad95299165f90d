"""The registry of models: each file of this folder registers its own."""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import UnionType
from typing import Any, TypeVar, Union, get_args, get_origin, get_type_hints

from pyro.nn import PyroModule
from torch import Tensor, nn

from calibrant.errors import ProgramError, names_to_offer
from calibrant.models.presets import Preset, Training, at_shape
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
        presets: named arguments, such as those of a paper's models; the tests run on them too.
    """

    name: str
    cls: type[PyroModule]
    paper: str
    equations: str
    licence: str
    cases: tuple[Case, ...]
    presets: Mapping[str, Preset] = field(default_factory=dict)


@dataclass(frozen=True)
class Recipe:
    """What is needed to rebuild a model: a registered name or `FILE.py:Class`, and arguments in JSON form."""

    name: str
    arguments: dict[str, Any]
    sha256: str = ""


MODELS: Registry[ModelCard] = Registry("model", ProgramError, "A file of yours: FILE.py:Class")


def register_model(
    name: str,
    *,
    paper: str,
    equations: str,
    licence: str,
    cases: tuple[Case, ...] = (),
    presets: Mapping[str, Preset] | None = None,
) -> Callable[[Model], Model]:
    """Class decorator that makes a model known by name to `create`, the command line and the tests.

    The arguments are the attributes of `ModelCard`.

    Raises:
        ProgramError: for a name that another class has.
    """

    def register(cls: Model) -> Model:
        MODELS.add(name, ModelCard(name, cls, paper, equations, licence, cases, presets or {}), cls)
        return cls

    return register


def name_of(program: PyroModule) -> str:
    """The name with which a model was created, or that of its class or function."""
    recipe: Recipe | None = getattr(program, "recipe", None)
    target = getattr(program, "function", program)
    return recipe.name if recipe is not None else getattr(target, "__name__", type(target).__name__)


def list_models(pattern: str = "*") -> list[str]:
    """Names of the registered models that match a shell pattern, sorted."""
    return MODELS.names(pattern)


def card(name: str) -> ModelCard:
    """The card of a registered model.

    Raises:
        ProgramError: for an unknown name, with the nearest ones.
    """
    return MODELS[name]


def list_presets(name: str) -> list[str]:
    """Names of the presets of a registered model; `card(name).presets` has what they are.

    Raises:
        ProgramError: for an unknown model.
    """
    return list(card(name).presets)


def _preset(name: str, preset: str) -> Preset:
    known = card(name).presets
    if preset not in known:
        offer = names_to_offer(preset, known) if known else f"the model {name!r} has none"
        raise ProgramError(f"unknown preset {preset!r} of the model {name!r}: {offer}")
    return known[preset]


def _expanded(name: str, preset: str, changes: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of a preset at the event shape that the changes give, with these changes."""
    given = _preset(name, preset).arguments
    return {**at_shape(given, tuple(changes.get("shape", given["shape"]))), **changes}


def training(name: str, preset: str, by: str = "recommended", **changes: Any) -> Training:
    """How a model of a preset is trained: data set, and the arguments of `create`, `amortize` and `fit`.

    With `t = training("ea-vae", "mnist", by="authors")`, the training is:

        train = data.load(t.data, **t.data_options)["train"].select(["x"])
        model = models.create(t.model, **t.arguments)
        guide = guides.amortize(model, train, **t.guide)
        inference.fit(model, guide, train, **t.fit)

    Args:
        name: a name of `list_models()`.
        preset: a name of `list_presets(name)`.
        by: "recommended" for the training of this package, whose objective is the ELBO, or another name of the preset's
            `trainings`, such as "authors" for that of the paper; `about` says where it departs from it.
        changes: arguments of `create` in place of those of the preset; widths of networks and the size of the images
            follow `shape`.

    Raises:
        ProgramError: for an unknown model, preset or training.
    """
    known = _preset(name, preset)
    if by not in known.trainings:
        offer = names_to_offer(by, known.trainings) if known.trainings else "it has none"
        raise ProgramError(f"unknown training {by!r} of the preset {preset!r} of {name!r}: {offer}")
    protocol = known.trainings[by]
    shape = tuple(changes.get("shape", known.arguments["shape"]))
    parts = (protocol.data_options, {**known.arguments, **protocol.arguments}, protocol.guide, protocol.fit)
    options, arguments, guide, fit = (at_shape(part, shape) for part in parts)
    return Training(name, preset, by, protocol.about, protocol.data, options, {**arguments, **changes}, guide, fit)


def create(name: str, preset: str | None = None, **arguments: Any) -> PyroModule:
    """Build a model from a registered name or `FILE.py:Class`.

    Name and arguments are kept in `model.recipe`, from which a run rebuilds the model; those of a preset are written
    out. The recipe is None if an argument has no JSON form, such as a module; such a model is loaded with
    `load(run, model=…)`.

    Args:
        name: a name of `list_models()`, or `FILE.py:Class` for a model of your own; a function of the file that returns
            a `PyroModule`, such as one of `from_pyro`, serves too.
        preset: a name of `list_presets(name)`, which gives all arguments that are not given here. Numbers of latents
            that a paper's model has per pixel follow `shape`.
        arguments: arguments of the constructor: numbers, strings, lists and dicts (tensors are stored as lists).

    Raises:
        ProgramError: for an unknown model or preset, or arguments that the constructor does not take.
    """
    if preset is not None and not is_user_spec(name):
        arguments = _expanded(name, preset, arguments)
    elif preset is not None:
        arguments["preset"] = preset
    cls, sha256 = load_object(name) if is_user_spec(name) else (card(name).cls, "")
    if not (inspect.isfunction(cls) or (inspect.isclass(cls) and issubclass(cls, nn.Module))):
        raise ProgramError(
            f"{name} is no class of modules: name a class that derives from pyro.nn.PyroModule, or a function that "
            "returns a program, def program(): return calibrant.from_pyro(model, x, y)"
        )
    signature = inspect.signature(cls)
    try:
        signature.bind(**arguments)
    except TypeError as error:
        raise ProgramError(f"{name}: {error}; its arguments are {signature}") from error
    check_values(name, cls, arguments)
    try:
        model: Any = cls(**arguments)
    except (TypeError, RuntimeError, ValueError, AttributeError) as error:
        raise (
            error if isinstance(error, ProgramError) else ProgramError(f"{name} could not be built: {error}")
        ) from error
    if not isinstance(model, PyroModule) and inspect.isfunction(cls):
        raise ProgramError(
            f"{name} returns {type(model).__name__}, not a module: name a function that returns a program, def "
            "program(): return calibrant.from_pyro(model, x, y)"
        )
    plain = _as_json(arguments)
    model.recipe = None if plain is None else Recipe(name, plain, sha256)
    return model


def check_values(name: str, cls: Callable[..., Any], arguments: Mapping[str, Any]) -> None:
    """Refuse arguments of another type than their annotation, where it is one of the usual ones.

    Raises:
        ProgramError: naming the argument, its value and the value wanted.
    """
    try:
        hints = get_type_hints(cls.__init__ if inspect.isclass(cls) else cls)
    except Exception:  # annotations of a user's class may name what only a type checker knows
        return
    defaults = {key: parameter.default for key, parameter in inspect.signature(cls).parameters.items()}
    for key, value in arguments.items():
        is_count = hints.get(key) is int and isinstance(defaults.get(key), int) and defaults[key] > 0
        if not _is_of_type(value, hints.get(key, Any)) or (is_count and value < 1):
            wanted = _words(hints.get(key, Any)) + (" above 0" if is_count else "")
            raise ProgramError(f"{name}: {key}={json.dumps(value, default=repr)} is given, wanted {wanted}")


def _is_of_type(value: Any, hint: Any) -> bool:
    origin, inner = get_origin(hint), get_args(hint)
    if origin in (Union, UnionType):
        return any(_is_of_type(value, part) for part in inner)
    if hint in (int, float):  # numbers of numpy and torch too
        return hasattr(value, "__index__" if hint is int else "__float__") and not isinstance(value, bool)
    if hint == tuple[int, ...]:
        return isinstance(value, list | tuple) and all(_is_of_type(entry, int) and entry > 0 for entry in value)
    if origin is dict:
        return isinstance(value, Mapping)
    if hint is Any or not isinstance(hint, type) or origin is not None or getattr(hint, "_is_protocol", False):
        return True
    return isinstance(value, hint)


def _words(hint: Any) -> str:
    if hint == tuple[int, ...]:
        return "a list of whole numbers above 0, such as [1, 8, 8]"
    return {int: "a whole number", float: "a number", str: "a word"}.get(hint, str(getattr(hint, "__name__", hint)))


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

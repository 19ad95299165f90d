"""What holds inside the calls of this package and nowhere else: where Pyro keeps parameters, and torch's modes.

Pyro reads its setting `module_local_params` only while a `PyroModule` runs. It is on while this package runs a program
or guide, and off again before any other code runs: a user's callback, a data function, what follows an error.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping, MutableMapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, replace
from typing import Any
from weakref import WeakKeyDictionary

import pyro
import torch
from pyro.nn.module import _Context

from calibrant.progress import displayed, remarking
from calibrant.turns import outside, turn

_PROGRESS = "progress"
_CALLED_BACK = (_PROGRESS, "infer")  # arguments that are functions of the user, and no part of a program
States = MutableMapping[_Context, dict[str, Any]]

_STORE = ("_params", "_constraints", "_param_to_name")  # all that Pyro's parameter store consists of


class _StatesOfRun:
    """The attribute `param_state` of Pyro's contexts during a run, empty at first, whoever built the module."""

    def __init__(self) -> None:
        self.states: States = WeakKeyDictionary()

    def __get__(self, context: _Context, owner: type | None = None) -> dict[str, Any]:
        return self.states.setdefault(context, {"params": {}, "constraints": {}})

    def __set__(self, context: _Context, state: dict[str, Any]) -> None:
        self.states[context] = state


@contextmanager
def parameters_in_modules() -> Iterator[States]:
    """Run programs whose parameters stay in their modules, as every run of a program and guide in this package does.

    Pyro's parameter store is set aside for that time, with what the user has in it. Returns the parameters that
    `pyro.param` and `pyro.module` register, which the contract does not allow: context of a module → state.
    """
    running = vars(_Context).get("param_state")
    if running is not None:
        yield running.states
        return
    store, states = pyro.get_param_store(), _StatesOfRun()
    kept = {name: getattr(store, name) for name in _STORE}
    setattr(_Context, "param_state", states)  # noqa: B010  (mypy knows no such attribute of the class)
    try:
        with pyro.settings.context(module_local_params=True):
            vars(store).update({name: type(part)() for name, part in kept.items()})
            yield states.states
    finally:
        delattr(_Context, "param_state")
        vars(store).update(kept)


@dataclass(frozen=True)
class _Modes:
    """The modes of torch and the settings of Pyro that hold for the whole process or thread."""

    dtype: torch.dtype
    device: torch.device
    gradients: bool
    inference: bool
    autocast: Mapping[str, bool]
    settings: Mapping[str, Any]

    @classmethod
    def now(cls) -> _Modes:
        return cls(
            torch.get_default_dtype(),
            torch.get_default_device(),
            torch.is_grad_enabled(),
            torch.is_inference_mode_enabled(),
            {device: torch.is_autocast_enabled(device) for device in ("cpu", "cuda")},
            pyro.settings.get(),
        )

    def usual(self, gradients: bool) -> _Modes:
        """The modes in which calls run: no autocast, no device without values, and gradients if asked."""
        device = torch.device("cpu") if self.device.type == "meta" else self.device
        plain = replace(self, device=device, autocast=dict.fromkeys(self.autocast, False))
        return replace(plain, gradients=True, inference=False) if gradients else plain

    @contextmanager
    def held(self) -> Iterator[None]:
        """Set these modes, and those that held before again afterwards."""
        before = _Modes.now()
        with ExitStack() as modes:
            modes.enter_context(pyro.settings.context(**self.settings))
            modes.callback(torch.set_default_dtype, before.dtype)
            torch.set_default_dtype(self.dtype)
            if self.device != before.device:
                modes.enter_context(self.device)
            for device, enabled in self.autocast.items():
                if enabled != before.autocast[device]:
                    modes.enter_context(torch.autocast(device, torch.get_autocast_dtype(device), enabled))
            modes.enter_context(torch.inference_mode(self.inference))  # this sets the gradient mode too
            modes.enter_context(torch.set_grad_enabled(self.gradients))
            yield


def _called_back(function: Any, modes: _Modes) -> Any:
    """A function of the user, to be called in the modes that the user had set."""

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        with outside(), modes.held():
            return function(*args, **kwargs)

    return call


@contextmanager
def _resolved(given: inspect.BoundArguments, users: Iterable[str], modes: _Modes, is_outermost: bool) -> Iterator[None]:
    """Put functions in the place of arguments that are called back: the user's own, in the modes of the user, or a
    display of progress, which calls within calls do not have."""
    functions = {name: given.arguments[name] for name in users if callable(given.arguments.get(name))}
    given.arguments.update({name: _called_back(part, modes) for name, part in functions.items()})
    if _PROGRESS in functions:
        given.arguments[_PROGRESS] = remarking(given.arguments[_PROGRESS])
    if _PROGRESS not in users or _PROGRESS in functions:
        yield
        return
    asked = given.arguments.get(_PROGRESS, given.signature.parameters[_PROGRESS].default)
    with displayed(asked if is_outermost or asked is not True else False) as function:
        given.arguments[_PROGRESS] = function
        yield


def own_call(function: Callable[..., Any], facade: str, gradients: bool = True) -> Callable[..., Any]:
    """A public function as its facade offers it: calls take turns, in torch's usual modes, which are restored after.

    Args:
        function: the function as its file defines it; what is given as `progress` or `infer` is called in the modes of
            the caller, and a display takes the place of `progress=True`.
        facade: name of the facade, under which the result can be pickled.
        gradients: whether gradients are on inside although the caller has turned them off.
    """

    signature = inspect.signature(function)
    users = [name for name in _CALLED_BACK if name in signature.parameters]

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        with turn() as is_outermost, ExitStack() as held:
            modes = _Modes.now()
            if users:
                with suppress(TypeError):  # wrong arguments are left to the call
                    given = signature.bind(*args, **kwargs)
                    held.enter_context(_resolved(given, users, modes, is_outermost))
                    args, kwargs = given.args, given.kwargs
            held.enter_context(modes.usual(gradients).held())
            return function(*args, **kwargs)

    call.__module__ = facade
    return call


def own_calls(facade: str, names: Mapping[str, Any], public: Iterable[str], gradients: bool = True) -> dict[str, Any]:
    """All public functions of a facade as own calls, by name; see `own_call`. Classes and constants are left out."""
    found = {name: names[name] for name in public if name in names}
    return {name: own_call(part, facade, gradients) for name, part in found.items() if inspect.isfunction(part)}

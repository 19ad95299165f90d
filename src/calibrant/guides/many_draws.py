"""Many draws for each datum: the guide runs on repeated rows, its encoder on one row a datum."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any

from pyro.nn import PyroModule
from torch import Tensor, nn

from calibrant.guides.adapters import EncoderGuide
from calibrant.guides.amortized import AmortizedGuide
from calibrant.guides.collapsed import CollapsedGuide
from calibrant.guides.refined import RefinedGuide


@contextmanager
def encoded_once(guide: PyroModule, repeats: int) -> Iterator[None]:
    """Inside, every datum comes `repeats` times in a row, and the guide's encoder sees it once.

    What depends on a datum alone is then computed once for all its draws (`Modulation.through`). Encoders of guides
    made here are functions of the data alone; what a guide written by hand calls its encoder may be anything, so that
    such a guide runs on all rows.
    """
    inner = _unrefined(guide)
    encoder = getattr(inner, "encoder", None)
    if repeats == 1 or not isinstance(inner, AmortizedGuide | CollapsedGuide | EncoderGuide) or encoder is None:
        yield
        return
    hooks: list[Any] = [encoder.register_forward_pre_hook(lambda _, inputs: _each(inputs, lambda r: r[::repeats]))]
    if isinstance(inner, EncoderGuide):  # the others repeat what their heads make of it
        again = partial(_each, function=lambda rows: rows.repeat_interleave(repeats, 0))
        hooks.append(encoder.register_forward_hook(lambda module, inputs, output: again(output)))
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


@contextmanager
def fixed(guide: PyroModule) -> Iterator[None]:
    """Inside, the model of a collapsed guide stays as it is: its conditional is read once, and can be recorded."""
    inner = _unrefined(guide)
    with inner.fixed() if isinstance(inner, CollapsedGuide) else nullcontext():
        yield


def _unrefined(guide: nn.Module) -> nn.Module:
    while isinstance(guide, RefinedGuide):
        guide = guide.start[0]
    return guide


def _each(values: Any, function: Callable[[Tensor], Tensor]) -> Any:
    """The function of every tensor in nested tuples, lists and dicts."""
    if isinstance(values, Tensor):
        return function(values)
    if isinstance(values, dict):
        return {name: _each(value, function) for name, value in values.items()}
    return type(values)(_each(value, function) for value in values) if isinstance(values, list | tuple) else values

"""Many draws per datum: guide and model run on repeated rows, but encoders on one row per datum."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from pyro.nn import PyroModule
from torch import Tensor, nn

from calibrant.guides.adapters import EncoderGuide
from calibrant.guides.amortized import AmortizedGuide
from calibrant.guides.collapsed import CollapsedGuide
from calibrant.guides.from_prior import PriorGuide
from calibrant.guides.refined import RefinedGuide


@contextmanager
def encoded_once(guide: PyroModule, repeats: int) -> Iterator[None]:
    """Let the encoder of a guide see one row per datum, where the rows of each datum are repeated `repeats` times.

    Everything that depends on a datum alone is then computed once for all its draws (`Modulation.through`). This needs
    an encoder that is a function of the data alone, as in the guides of this package. The attribute `encoder` of a
    guide written by hand may be anything, so that such a guide runs on all rows. Where the guide is the model's own
    prior, these are the modules of the model that say so themselves, by the attribute `per_datum = True`: functions of
    covariates alone, with the data as leading dimension of all that they take and return.
    """
    inner = _unrefined(guide)
    encoders, is_repeated = _encoders(inner) if repeats > 1 else [], isinstance(inner, EncoderGuide | PriorGuide)
    hooks: list[Any] = []
    again = partial(_each, function=lambda rows: rows.repeat_interleave(repeats, 0))
    for encoder in encoders:
        hooks.append(encoder.register_forward_pre_hook(lambda _, inputs: _each(inputs, lambda r: r[::repeats])))
        if is_repeated:  # heads of other guides repeat the features by themselves
            hooks.append(encoder.register_forward_hook(lambda module, inputs, output: again(output)))
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


@contextmanager
def encoded_before(guide: PyroModule, run: Callable[[], object]) -> Iterator[None]:
    """Let the encoder of a guide return in all runs what it returns in `run`, which is made once, for the same data.

    Where a guide runs on the same data many times, the encoder of a guide of `amortize` takes half of its time, or
    more. Random state is left unchanged. Other guides run as they are.
    """
    inner = _unrefined(guide)
    encoders = _encoders(inner) if isinstance(inner, AmortizedGuide | CollapsedGuide) else []
    seen: dict[nn.Module, Any] = {}
    hooks = [
        encoder.register_forward_hook(lambda module, _, output: seen.update({module: output})) for encoder in encoders
    ]
    try:
        with torch.random.fork_rng(), torch.no_grad():
            run()
    finally:
        for hook in hooks:
            hook.remove()
    for encoder, output in seen.items():
        encoder.forward = partial(_constant, output)
    try:
        yield
    finally:
        for encoder in seen:
            del encoder.forward


def _constant(output: Any, *inputs: Any) -> Any:
    return output


def _encoders(guide: nn.Module) -> list[nn.Module]:
    """The modules of a guide that see data alone; of several inside one another, the outermost."""
    if isinstance(guide, AmortizedGuide | CollapsedGuide | EncoderGuide):
        return [] if guide.encoder is None else [guide.encoder]
    return list(dict.fromkeys(_per_datum(guide.model))) if isinstance(guide, PriorGuide) else []


def _per_datum(module: nn.Module) -> Iterator[nn.Module]:
    if getattr(module, "per_datum", False):
        yield module
    else:
        for part in module.children():
            yield from _per_datum(part)


@contextmanager
def fixed(guide: PyroModule) -> Iterator[None]:
    """Read the conditional of a collapsed guide once, so that it can be recorded; the model must not change inside."""
    inner = _unrefined(guide)
    with inner.fixed() if isinstance(inner, CollapsedGuide) else nullcontext():
        yield


def _unrefined(guide: nn.Module) -> nn.Module:
    while isinstance(guide, RefinedGuide):
        guide = guide.start[0]
    return guide


def _each(values: Any, function: Callable[[Tensor], Tensor]) -> Any:
    """Apply a function to every tensor in nested tuples, lists and dicts."""
    if isinstance(values, Tensor):
        return function(values)
    if isinstance(values, dict):
        return {name: _each(value, function) for name, value in values.items()}
    if isinstance(values, list | tuple):
        parts = [_each(value, function) for value in values]
        return type(values)(*parts) if hasattr(values, "_fields") else type(values)(parts)  # a namedtuple
    return values

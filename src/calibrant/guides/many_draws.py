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

_KEPT = 2**25  # numbers that encoders returned, kept for later runs: 128 MiB in float32


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


class Encodings:
    """What the encoder of a guide returns for parts of the data, on each of which the guide runs several times.

    Where a guide runs on the same data many times, the encoder of a guide of `amortize` takes half of its time, or
    more. The first run on a part keeps what the encoder returns, a function of the data alone, and later runs take it;
    the weights must not change in between. Together, at most `_KEPT` numbers are kept, and nothing of a part on which
    one run encodes several times with different results, as for the rows of all combinations of discrete values. Other
    guides run as they are.
    """

    def __init__(self, guide: PyroModule) -> None:
        inner = _unrefined(guide)
        self._encoders = _encoders(inner) if isinstance(inner, AmortizedGuide | CollapsedGuide) else []
        self._kept: dict[int, dict[nn.Module, Tensor]] = {}
        self._left = _KEPT

    @contextmanager
    def of(self, part: int) -> Iterator[None]:
        """Let the guide run on the part of the data with this number, which is encoded in the first run alone."""
        if part in self._kept:
            with _returning(self._kept[part]):
                yield
            return
        with _outputs(self._encoders) as outputs:
            yield
        self._kept[part] = {}  # later runs encode anew, and what they return is not collected
        numbers = sum(output.numel() for found in outputs.values() for output in found[:1])
        if numbers <= self._left and all(output.equal(found[0]) for found in outputs.values() for output in found[1:]):
            self._left -= numbers
            self._kept[part] = {encoder: found[0] for encoder, found in outputs.items() if found}


@contextmanager
def encoded_before(guide: PyroModule, run: Callable[[], object]) -> Iterator[None]:
    """Let the encoder of a guide return in all runs what it returns in `run`, which is made once, for the same data.

    Random state is left unchanged. See `Encodings`.
    """
    encodings = Encodings(guide)
    with torch.random.fork_rng(), torch.no_grad(), encodings.of(0):
        run()
    with encodings.of(0):
        yield


@contextmanager
def _outputs(modules: list[nn.Module]) -> Iterator[dict[nn.Module, list[Tensor]]]:
    """Collect what modules return."""
    outputs: dict[nn.Module, list[Tensor]] = {module: [] for module in modules}
    hooks = [module.register_forward_hook(lambda one, _, output: outputs[one].append(output)) for module in modules]
    try:
        yield outputs
    finally:
        for hook in hooks:
            hook.remove()


@contextmanager
def _returning(outputs: dict[nn.Module, Tensor]) -> Iterator[None]:
    """Let modules return these outputs."""
    for module, output in outputs.items():
        module.forward = partial(_constant, output)
    try:
        yield
    finally:
        for module in outputs:
            del module.forward


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

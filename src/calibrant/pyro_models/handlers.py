"""Handlers under which an ordinary Pyro model is a program: its data plate is `data`, and nothing in it is observed."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import pyro.distributions as dist
from pyro.distributions.util import scale_and_mask
from pyro.poutine.indep_messenger import CondIndepStackFrame
from pyro.poutine.messenger import Messenger
from pyro.poutine.subsample_messenger import SubsampleMessenger
from pyro.poutine.util import site_is_subsample
from torch import Tensor

from calibrant.program.contract import PLATE
from calibrant.program.tracing import is_deterministic, is_factor
from calibrant.pyro_models.layouts import Layout, by_datum
from calibrant.pyro_models.parameters import OF_MODULE

_OBSERVED, _UNOBSERVED = "_observed", "_unobserved"  # of the two sites that Pyro makes of one with obs_mask=
_CHANGED = ("name", "fn", "mask", "scale", "cond_indep_stack", "is_observed")  # parts of a message


@dataclass(frozen=True)
class Sites:
    """What is known about the sites of a model from its own run.

    Attributes:
        plate: name of the plate that holds the data.
        same: names of other plates that hold the same data, at other sites.
        observed: sites of the data that have obs=.
        recorded: `pyro.deterministic` site of the data → dimension of its value that is the data, from the left; None
            for a value that all data share.
        masked: sites with obs_mask=.
        plates: sizes of all other plates.
    """

    plate: str
    same: frozenset[str] = frozenset()
    observed: frozenset[str] = frozenset()
    recorded: Mapping[str, int | None] = field(default_factory=dict)
    masked: frozenset[str] = frozenset()
    plates: Mapping[str, int] = field(default_factory=dict)

    def frame(self, site: Mapping[str, Any]) -> CondIndepStackFrame | None:
        """The plate of the data around a site; None for a shared site."""
        return next((f for f in site["cond_indep_stack"] if f.name == self.plate or f.name in self.same), None)

    def sizes(self, size: int | None) -> dict[str, int]:
        """The sizes of all plates for this number of data; None for that of the model."""
        own = {} if size is None else dict.fromkeys((self.plate, *self.same), size)
        return {**self.plates, **own}

    def name(self, name: str, recorded: bool = False) -> str:
        """The name in the program of a site of the model; empty for what stands for missing entries."""
        imputed = name.endswith(_UNOBSERVED) and name.removesuffix(_UNOBSERVED) in self.masked
        if imputed or (recorded and name in self.masked):
            return ""
        seen = name.removesuffix(_OBSERVED)
        return seen if seen in self.masked else name


def with_masks(names: Iterator[str]) -> frozenset[str]:
    """The sites with obs_mask= among these, each of which is three: one observed, one not, and their union."""
    found = frozenset(names)
    return frozenset(n for n in found if {n + _OBSERVED, n + _UNOBSERVED} <= found)


@contextmanager
def plates_sized(sizes: Mapping[str, int]) -> Iterator[None]:
    """Let the named plates have these sizes, whatever the model says, and no plate take a subsample."""
    own = SubsampleMessenger._subsample

    def whole(
        name: str,
        size: int | None = None,
        subsample_size: int | None = None,
        subsample: Any = None,
        use_cuda: bool | None = None,
        device: str | None = None,
    ) -> Any:
        return own(name, sizes.get(name, size), None, None, use_cuda, device)

    setattr(SubsampleMessenger, "_subsample", staticmethod(whole))  # noqa: B010  (mypy forbids the assignment)
    try:
        yield
    finally:
        setattr(SubsampleMessenger, "_subsample", staticmethod(own))  # noqa: B010


class AsProgram(Messenger):
    """Shows the sites of a model to all handlers outside as those of a program, and gives their values to the model in
    its own layout."""

    def __init__(self, sites: Sites, size: int, parameters: Callable[[str], Tensor | None]) -> None:
        super().__init__()
        self.sites, self.size, self.parameters = sites, size, parameters
        self.open: list[tuple[dict[str, Any], Callable[[Tensor], Tensor]]] = []

    def _pyro_param(self, msg: Any) -> None:
        name = msg["name"]
        msg["value"] = msg["args"][1] if OF_MODULE in name and len(msg["args"]) > 1 else self.parameters(name)

    def _pyro_sample(self, msg: Any) -> None:
        if not site_is_subsample(msg):
            before = dict(msg)
            self.open.append((before, self._show(msg)))

    def _pyro_post_sample(self, msg: Any) -> None:
        if not site_is_subsample(msg):
            before, to_model = self.open.pop()
            value = to_model(msg["value"])
            msg.update({part: before[part] for part in _CHANGED}, value=value)

    def _show(self, msg: Any) -> Callable[[Tensor], Tensor]:
        """Change a message into that of a program; returns what makes a value of the program one of the model."""
        name, own, recorded = msg["name"], msg["value"], is_deterministic(msg)
        msg["name"], frame = self.sites.name(name, recorded), self.sites.frame(msg)
        if not msg["name"]:
            msg["stop"] = True  # a missing entry, which the program sums out
            return _same
        if frame is None:
            return _same
        loops = [other for other in msg["cond_indep_stack"] if other.dim is None]
        plates, msg["cond_indep_stack"] = msg["cond_indep_stack"], (self._frame(), *loops)
        if recorded:
            self._show_recorded(msg)
            return lambda value: own
        layout = Layout.of(msg["fn"].batch_shape, frame, plates)
        if is_factor(msg):
            _show_factor(msg, layout)
            return lambda value: own
        event_dim = msg["fn"].event_dim
        masked = msg["fn"] if msg["mask"] is None or msg["mask"] is True else msg["fn"].mask(msg["mask"])
        msg.update(mask=None, scale=layout.weight(name, msg["scale"]), fn=layout.distribution(name, masked))
        if name in self.sites.observed:
            msg.update(value=None, is_observed=False)
        elif own is not None:
            msg["value"] = layout.to_program(own, event_dim)
        return layout.to_model

    def _frame(self) -> CondIndepStackFrame:
        return CondIndepStackFrame(PLATE, -1, self.size, 0, self.size)

    def _show_recorded(self, msg: Any) -> None:
        dim = self.sites.recorded.get(msg["name"])
        if dim is None:
            msg["cond_indep_stack"] = ()
        else:
            msg["value"] = msg["value"].movedim(dim, 0)


def _same(value: Tensor) -> Tensor:
    return value


def _show_factor(msg: Any, layout: Layout) -> None:
    fn = msg["fn"]
    log_factor = scale_and_mask(fn.log_factor.expand(fn.batch_shape), 1.0, msg["mask"])
    log_factor = by_datum(layout.to_program(log_factor, 0)).sum(1)
    msg.update(mask=None, scale=layout.weight(msg["name"], msg["scale"]), fn=dist.Unit(log_factor))
    msg["value"] = msg["fn"].sample()

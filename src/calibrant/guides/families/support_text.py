"""Supports as text, from which guides are rebuilt, and the maps from the real line to them.

`interval[0.0, 5.0]` is a support with its bounds; bounds that differ between the entries of a site are nested lists.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import torch
from pyro.distributions import constraints
from torch import Tensor, nn
from torch.distributions import biject_to
from torch.distributions.transforms import Transform

from calibrant.errors import ProgramError

Bounds = list[Any]  # numbers, or nested lists of them
BOUNDED: dict[str, tuple[Callable[..., Any], tuple[str, ...]]] = {
    "interval": (constraints.interval, ("lower_bound", "upper_bound")),
    "greater_than": (constraints.greater_than, ("lower_bound",)),
    "less_than": (constraints.less_than, ("upper_bound",)),
}
NAMED: dict[str, Any] = {
    "real": constraints.real,
    "positive": constraints.positive,
    "simplex": constraints.simplex,
    "corr_cholesky": constraints.corr_cholesky,
    "corr_matrix": constraints.corr_matrix,
    "ordered_vector": constraints.ordered_vector,
    "positive_ordered_vector": constraints.positive_ordered_vector,
    "softplus_positive": constraints.softplus_positive,
}
_SAME = {constraints.half_open_interval: "interval", constraints.greater_than_eq: "greater_than"}


def describe(site: str, support: Any, event_dims: int) -> str:
    """Convert a support, without `independent` around it, to text.

    Args:
        site: name of the site, for error messages.
        support: the constraint.
        event_dims: number of event dimensions of the site's prior; bounds may have a data dimension before them.

    Raises:
        ProgramError: for a support without a map from the real line, or bounds that differ between data.
    """
    kinds: dict[Any, str] = {kind: name for name, (kind, _) in BOUNDED.items()} | _SAME
    if (name := kinds.get(type(support))) is not None:
        bounds = [_bound(site, getattr(support, bound), event_dims) for bound in BOUNDED[name][1]]
        return "positive" if name == "greater_than" and bounds == [0.0] else name + json.dumps(bounds)
    for name, constraint in NAMED.items():
        if type(support) is type(constraint):
            return name
    raise ProgramError(
        f"site {site!r} has support {support}, which no family covers (only {sorted((*BOUNDED, *NAMED))}, discrete "
        "ones with finitely many values, angles and spheres): sample it on one of those and transform the value in the "
        "program, or write the guide by hand (a PyroModule called as guide(observed, size, **covariates))"
    )


def _bound(site: str, bound: Any, event_dims: int) -> Any:
    values = torch.as_tensor(bound, dtype=torch.float64).detach()
    while values.dim() > event_dims:
        if not (values == values[:1]).all():
            raise ProgramError(
                f"the support of site {site!r} differs between data or plates: sample it on a fixed support and "
                "transform the value in the program"
            )
        values = values[0]
    return float(values.flatten()[0]) if (values == values.flatten()[0]).all() else values.tolist()


class Support(nn.Module):
    """A support that `describe` has converted to text; its bounds follow the device and dtype of the guide."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.name, bracket, bounds = text.partition("[")
        self.numbers: Bounds = json.loads(bracket + bounds) if bracket else []
        for index, bound in enumerate(self.numbers):
            if isinstance(bound, list):
                self.register_buffer(f"bound{index}", torch.tensor(bound))

    @property
    def is_real(self) -> bool:
        """Whether the support is the real line."""
        return self.name == "real"

    @property
    def reach(self) -> float:
        """Distance from zero on the unconstrained line beyond which float32 cannot represent the value."""
        return {"interval": 15.0, "simplex": 15.0, "corr_cholesky": 8.0, "corr_matrix": 8.0}.get(self.name, 80.0)

    def constraint(self) -> Any:
        """The support as a constraint of torch."""
        if self.name in NAMED:
            return NAMED[self.name]
        bounds = [getattr(self, f"bound{index}", bound) for index, bound in enumerate(self.numbers)]
        return BOUNDED[self.name][0](*bounds)

    def transforms(self) -> list[Transform]:
        """The maps from unconstrained numbers to the support; they never reach its bounds."""
        if self.is_real:
            return []
        constraint = self.constraint()
        limits = (0.0, 1.0) if self.name == "simplex" else _limits(constraint)
        return [biject_to(constraint), *([KeepInside(*limits)] if limits != (None, None) else [])]


def _limits(constraint: Any) -> tuple[Any, Any]:
    return getattr(constraint, "lower_bound", None), getattr(constraint, "upper_bound", None)


class KeepInside(Transform):
    """Replaces a value that was rounded to a bound by the next number inside, where priors have a density."""

    domain = constraints.real
    codomain = constraints.real
    bijective = True
    sign = 1

    def __init__(self, low: Any = None, high: Any = None) -> None:
        super().__init__()
        self.low, self.high = low, high

    def _call(self, x: Tensor) -> Tensor:
        if self.low is not None:
            low = torch.as_tensor(self.low).to(x)
            x = x.maximum(low + _gap(low))
        if self.high is not None:
            high = torch.as_tensor(self.high).to(x)
            x = x.minimum(high - _gap(high))
        return x

    def _inverse(self, y: Tensor) -> Tensor:
        return y

    def log_abs_det_jacobian(self, x: Tensor, y: Tensor) -> Tensor:
        """Zero, since the map is the identity up to rounding."""
        return torch.zeros_like(x)


def _gap(bound: Tensor) -> Tensor:
    numbers = torch.finfo(bound.dtype)
    return (bound.abs() * numbers.eps).clamp_min(numbers.tiny)

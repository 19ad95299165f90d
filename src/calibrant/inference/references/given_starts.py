"""The starts and data that a user gives for a density, as tensors with the posteriors first."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from calibrant.errors import InferenceError, names_to_offer
from calibrant.inference.references.plain import GIVEN, WHOLE, Parameters, PlainTarget

_RESERVED = {"chain", "draw", "data"}  # dimensions of the result, which no parameter can be called


@dataclass(frozen=True)
class GivenStarts:
    """Where chains start, and the data of their posteriors.

    Attributes:
        values: parameter → starts `(posterior, chain, *shape)`, float64.
        data: name → `(posterior, …)`, numbers with a fraction in float64; empty for a single posterior without data.
        parameters: shapes and supports of the parameters.
        named: whether the density takes the data as a mapping.
    """

    values: dict[str, Tensor]
    data: dict[str, Tensor]
    parameters: Parameters
    named: bool

    @classmethod
    def of(cls, start: Any, data: Any, supports: Any) -> GivenStarts:
        """Starts and data in the forms that `inference.sample` takes.

        Raises:
            InferenceError: for other shapes, for values that are not finite, and for starts outside their support.
        """
        rows = {} if data is None else _tensors(data, "data", GIVEN)
        posteriors = _length(rows) if rows else None
        named = isinstance(start, Mapping)
        values = {name: value.double() for name, value in _tensors(start, "start", WHOLE).items()}
        if taken := sorted(_RESERVED & set(values)):
            raise InferenceError(f"no parameter can be called {taken[0]!r}: a dimension of the result has this name")
        if posteriors is None:
            values = {name: value[None] for name, value in values.items()}
        _require_starts(values, posteriors, named)
        if not isinstance(supports, Mapping):
            raise InferenceError(f"supports is {supports}: give name of a parameter → constraint")
        if supports and not named:
            raise InferenceError(
                "supports are given by name, and start is one tensor: give start as a mapping that names the "
                "parameters; log_density then takes a dict"
            )
        for name in supports:
            if name not in values:
                raise InferenceError(f"supports names {name!r}, which is no parameter: {names_to_offer(name, values)}")
        parameters = Parameters.of({name: value.shape[2:] for name, value in values.items()}, supports, named)
        _require_inside(values, parameters)
        return cls(values, rows, parameters, isinstance(data, Mapping))

    @property
    def posteriors(self) -> int:
        """Number of posteriors."""
        return len(next(iter(self.values.values())))

    @property
    def chains(self) -> int:
        """Number of chains of a posterior."""
        return next(iter(self.values.values())).shape[1]

    def target(self, function: Callable[..., Tensor], batched: bool, device: torch.device) -> PlainTarget:
        """A user's function as a density with these data, on a device."""
        many = function if batched else torch.func.vmap(function)
        data = {name: value.to(device) for name, value in self.data.items()}
        return PlainTarget(many, self.parameters, data, self.posteriors, self.named)

    def vectors(self, device: torch.device) -> Tensor:
        """The starts as vectors on the line, `(posterior, chain, width)`.

        Raises:
            InferenceError: for starts at the edge of their support.
        """
        flat = {name: value.flatten(0, 1).to(device) for name, value in self.values.items()}
        found = self.parameters.vectors(flat)
        if not found.isfinite().all():
            raise InferenceError("some starts lie at the edge of their support: move them into its interior")
        return found.reshape(self.posteriors, self.chains, -1)


def _tensors(given: Any, what: str, alone: str) -> dict[str, Tensor]:
    named = given if isinstance(given, Mapping) else {alone: given}
    found = {}
    for name, value in named.items():
        shown = f"{what}[{name!r}]" if isinstance(given, Mapping) else what
        try:
            tensor = torch.as_tensor(value).detach()
        except Exception as error:  # whatever is no array
            raise InferenceError(f"{shown} is no tensor or array of numbers ({error}): {_FORMS[what]}") from error
        if tensor.is_complex() or not tensor.dim() or not tensor.numel():
            raise InferenceError(f"{shown} has shape {tuple(tensor.shape)} and dtype {tensor.dtype}: {_FORMS[what]}")
        if not tensor.isfinite().all():
            raise InferenceError(f"{shown} holds NaN or infinity: give finite numbers")
        found[str(name)] = tensor.double() if tensor.is_floating_point() else tensor
    if not found:
        raise InferenceError(f"{what} is empty: {_FORMS[what]}")
    return found


_FORMS = {
    "data": "give one row of real numbers for each posterior, (posteriors, …)",
    "start": (
        "give a start for each chain, (chains, d) or name → (chains, …); with data (posteriors, chains, d) or "
        "name → (posteriors, chains, …)"
    ),
}


def _length(rows: Mapping[str, Tensor]) -> int:
    lengths = {name: len(value) for name, value in rows.items()}
    if len(set(lengths.values())) > 1:
        raise InferenceError(f"data have different numbers of rows ({lengths}): {_FORMS['data']}")
    return next(iter(lengths.values()))


def _require_starts(values: Mapping[str, Tensor], posteriors: int | None, named: bool) -> None:
    """Refuse starts without the dimensions of posteriors and chains; `values` have both already."""
    shapes = {name: tuple(value.shape if posteriors is not None else value.shape[1:]) for name, value in values.items()}
    shown = str(shapes if named else next(iter(shapes.values())))
    wanted = 3 - named
    if any(value.dim() < wanted or (not named and value.dim() != wanted) for value in values.values()):
        one = next(iter(values.values()))
        hint = ""
        if not named and one.dim() == 2 and posteriors is None:
            hint = f"; for 4 chains around one point: start + torch.randn(4, {one.shape[1]})"
        elif not named and posteriors is not None and one.dim() == 2:
            hint = f"; for the same starts in every posterior: start.expand({posteriors}, -1, -1)"
        raise InferenceError(f"start has shape {shown}: {_FORMS['start']}{hint}")
    if posteriors is not None and any(len(value) != posteriors for value in values.values()):
        raise InferenceError(f"start has shape {shown}, and data have {posteriors} rows: {_FORMS['start']}")
    if len({value.shape[:2] for value in values.values()}) > 1:
        raise InferenceError(f"start has shapes {shown}, with different numbers of chains: {_FORMS['start']}")


def _require_inside(values: Mapping[str, Tensor], parameters: Parameters) -> None:
    for name, site in parameters.sites.items():
        inside = site.support.check(values[name]).reshape(*values[name].shape[:2], -1).all(-1)
        if not inside.all():
            at = tuple((~inside).nonzero()[0].tolist())
            raise InferenceError(
                f"start[{name!r}] leaves the support {site.support} in {int((~inside).sum())} chains, first at "
                f"{at if len(values[name]) > 1 else at[1:]}: give values inside it, not unconstrained ones"
            )

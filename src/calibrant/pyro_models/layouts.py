"""Distributions and values of a site whose data lie in any batch dimension, with the data first and the rest as event.

The result consists of ordinary distributions with rearranged parameters, so that supports, families and divergences in
closed form are those of any other program.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import pyro.distributions as dist
import torch
from pyro.poutine.indep_messenger import CondIndepStackFrame
from torch import Tensor
from torch.distributions import AffineTransform, Independent, MixtureSameFamily, TransformedDistribution

from calibrant.errors import ProgramError

_EITHER = (("probs", "logits"), ("scale_tril", "covariance_matrix", "precision_matrix"))  # constructors take one


@dataclass(frozen=True)
class Layout:
    """Where the data lie among the batch dimensions of a site.

    Attributes:
        batch: batch shape of the site in the model.
        order: batch dimensions of the model, counted from the left, in the order of the program: the data first.
            Dimensions of size 1 that no plate has are left out.
    """

    batch: torch.Size
    order: tuple[int, ...]

    @classmethod
    def of(cls, batch: torch.Size, data: CondIndepStackFrame, frames: Iterable[CondIndepStackFrame]) -> Layout:
        """The layout of a site inside the plate `data`, with these vectorized plates around it."""
        own = {len(batch) + frame.dim for frame in frames if frame.dim is not None}
        first = len(batch) + (data.dim or 0)
        others = [dim for dim, size in enumerate(batch) if dim != first and (size != 1 or dim in own)]
        return cls(batch, (first, *others))

    @property
    def events(self) -> int:
        """How many batch dimensions of the model become event."""
        return len(self.order) - 1

    def to_program(self, value: Tensor, event_dim: int) -> Tensor:
        """A value of the model with the data first: `(data, others…, event…)`."""
        event = value.shape[value.dim() - event_dim :]
        value = value.expand(*self.batch, *event)
        return value.permute(*self._all(), *range(len(self.batch), value.dim())).reshape(*self._sizes(), *event)

    def to_model(self, value: Tensor) -> Tensor:
        """A value of the program where the model has it."""
        event = value.shape[len(self.order) :]
        dropped = len(self.batch) - len(self.order)
        whole = value.reshape(*self._sizes(), *[1] * dropped, *event)
        back = [self._all().index(dim) for dim in range(len(self.batch))]
        return whole.permute(*back, *range(len(self.batch), whole.dim()))

    def distribution(self, name: str, fn: Any) -> Any:
        """The distribution with the data first and the other batch dimensions as event.

        Raises:
            ProgramError: for a distribution whose parameters cannot be rearranged.
        """
        if self.order != tuple(range(len(self.batch))):
            try:
                fn = rearranged(fn, self.order, self.batch)
            except (TypeError, ValueError, RuntimeError, AttributeError) as error:
                raise ProgramError(
                    f"the data of site {name!r} lie in batch dimension {self.order[0] - len(self.batch)} of "
                    f"{len(self.batch)}, and {type(fn).__name__} cannot be rearranged ({error}): let the plate of the "
                    f"data have the dimension furthest to the left, as in pyro.plate(..., dim={-len(self.order)})"
                ) from error
        return fn.to_event(self.events) if self.events else fn

    def weight(self, name: str, scale: Any) -> Any:
        """A scale around the site, one for each datum.

        Raises:
            ProgramError: for a scale that differs within a datum.
        """
        if not isinstance(scale, Tensor) or scale.numel() == 1:
            return scale.reshape(()) if isinstance(scale, Tensor) else scale
        rows = by_datum(self.to_program(scale, 0))
        if (rows != rows[:, :1]).any():
            raise ProgramError(
                f"the scale around site {name!r} differs within a datum: scale whole data, or mask single entries"
            )
        return rows[:, 0]

    def _all(self) -> list[int]:
        return [*self.order, *(dim for dim in range(len(self.batch)) if dim not in self.order)]

    def _sizes(self) -> list[int]:
        return [self.batch[dim] for dim in self.order]


def rearranged(fn: Any, order: tuple[int, ...], batch: torch.Size) -> Any:
    """A distribution of this batch shape with its batch dimensions in another order; dimensions of size 1 may be left
    out."""
    if isinstance(fn, Independent):
        inner = fn.base_dist.batch_shape[len(fn.batch_shape) :]
        return rearranged(fn.base_dist, _longer(order, batch, len(inner)), batch + inner).to_event(len(inner))
    if isinstance(fn, dist.MaskedDistribution):
        mask = _moved(torch.as_tensor(fn._mask), order, batch, 0)
        return rearranged(fn.base_dist, order, batch).mask(mask)
    if isinstance(fn, dist.ExpandedDistribution):
        return rearranged(fn.base_dist, order, batch)
    if isinstance(fn, MixtureSameFamily):
        count = fn.mixture_distribution.probs.shape[-1:]
        components = rearranged(fn.component_distribution, _longer(order, batch, 1), batch + count)
        return type(fn)(rearranged(fn.mixture_distribution, order, batch), components)
    if isinstance(fn, TransformedDistribution) and not fn.arg_constraints:
        return _transformed(fn, order, batch)
    return type(fn)(**_parameters(fn, order, batch), validate_args=False)


def _transformed(fn: Any, order: tuple[int, ...], batch: torch.Size) -> Any:
    def moved(part: Any) -> Any:
        return _moved(part, order, batch, fn.event_dim) if isinstance(part, Tensor) else part

    transforms = [
        AffineTransform(moved(one.loc), moved(one.scale), one.event_dim) if isinstance(one, AffineTransform) else one
        for one in fn.transforms
    ]
    return dist.TransformedDistribution(rearranged(fn.base_dist, order, batch), transforms)


def _parameters(fn: Any, order: tuple[int, ...], batch: torch.Size) -> dict[str, Any]:
    """The arguments with which a distribution is built again."""
    wanted = [p for p in inspect.signature(type(fn).__init__).parameters.values() if p.name in _known(fn)]
    left_out = {name for names in _EITHER for name in _but_one(fn, names)}
    constraints = fn.arg_constraints
    found = {p.name: getattr(fn, p.name) for p in wanted if p.name not in left_out}
    return {
        name: _moved(value, order, batch, getattr(constraints.get(name), "event_dim", 0))
        if isinstance(value, Tensor)
        else value
        for name, value in found.items()
    }


def _known(fn: Any) -> set[str]:
    """Names of the arguments that a distribution still has as attributes."""
    names = set(inspect.signature(type(fn).__init__).parameters) - {"self", "validate_args"}
    return {name for name in names if hasattr(fn, name)}


def _but_one(fn: Any, names: tuple[str, ...]) -> list[str]:
    """All alternatives of a parameter except the one with which the distribution was built."""
    have = [name for name in names if name in fn.arg_constraints]
    built = next((name for name in have if name in vars(fn)), have[0] if have else "")
    return [name for name in have if name != built]


def _moved(value: Tensor, order: tuple[int, ...], batch: torch.Size, event_dim: int) -> Tensor:
    return Layout(batch, order).to_program(value, event_dim)


def _longer(order: tuple[int, ...], batch: torch.Size, count: int) -> tuple[int, ...]:
    """The same order with further dimensions to the right, which keep their place."""
    return (*order, *range(len(batch), len(batch) + count))


def by_datum(value: Tensor) -> Tensor:
    """A tensor with the data first as a matrix with a row for each datum."""
    return value.reshape(len(value), -1)

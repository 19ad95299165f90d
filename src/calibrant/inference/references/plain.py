"""A density that is a plain function of tensors, on flat unconstrained vectors, for many chains at once.

As for a program (`target`), positive, bounded, simplex and similar parameters are mapped to ℝⁿ by `coordinates`, with
the log determinant of the map. A function tells nothing of its structure, so that there are no other coordinates to
choose from (`pairs`), no discrete latents, and no prior from which chains could start.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import pyro.distributions as dist
import torch
from torch import Tensor

from calibrant.errors import InferenceError
from calibrant.inference.references.coordinates import at_an_edge, raw_shape, to_raw, to_support
from calibrant.inference.references.target import Block, Pair
from calibrant.program.contract import Values

Given = Tensor | dict[str, Tensor]  # what a user's function takes, for all of its parameters, and for all data
WHOLE = "q"  # name of the parameters that a user gives as one tensor
GIVEN = "x"  # name of the data that a user gives as one tensor


@dataclass(frozen=True)
class Parameters:
    """The parameters of a density, and their places in a vector.

    Attributes:
        shapes: name → shape of one value.
        sites: name → an improper distribution on the support, for parameters that are not on the whole line.
        named: whether the density takes a mapping; otherwise it takes the one tensor alone.
    """

    shapes: dict[str, torch.Size]
    sites: dict[str, Any]
    named: bool

    @classmethod
    def of(cls, shapes: Mapping[str, torch.Size], supports: Mapping[str, Any], named: bool) -> Parameters:
        """Parameters with these shapes and supports.

        Raises:
            InferenceError: for a support that has no map from ℝⁿ, or that does not fit the shape.
        """
        sites = {}
        for name, support in supports.items():
            try:
                sites[name] = dist.ImproperUniform(support, (), shapes[name])
                raw_shape(name, {"fn": sites[name], "value": torch.zeros(shapes[name])})
            except Exception as error:  # torch raises anything for what is no support, or does not fit
                raise InferenceError(
                    f"supports[{name!r}] = {support}: torch has no map from unconstrained numbers to a value of shape "
                    f"{tuple(shapes[name])} there; give a continuous constraint of torch.distributions.constraints, "
                    "or write log_density on numbers that are not constrained"
                ) from error
        return cls(dict(shapes), sites, named)

    @property
    def blocks(self) -> dict[str, Block]:
        """The place of every parameter in a vector."""
        found, start = {}, 0
        for name, shape in self.shapes.items():
            if name in self.sites:
                shape = raw_shape(name, {"fn": self.sites[name], "value": torch.zeros(shape)})
            found[name] = Block(name, start, shape, True)
            start = found[name].stop
        return found

    def vectors(self, values: Mapping[str, Tensor]) -> Tensor:
        """Vectors `(rows, width)` for values `(rows, *shape)` that lie in their supports."""
        raw = [to_raw(self.sites[name], value) if name in self.sites else value for name, value in values.items()]
        return torch.cat([value.reshape(len(value), -1) for value in raw], 1)


class PlainTarget:
    """A function of tensors as a density that chains can sample; see `targets.Sampled`.

    Args:
        function: log density of parameters `(rows, …)`, and of data `(rows, …)` if there are any; returns `(rows,)`.
        parameters: the parameters that it takes.
        data: name → tensor with one row per posterior.
        total: number of posteriors.
        named: whether the function takes the data as a mapping.
    """

    def __init__(
        self,
        function: Callable[..., Tensor],
        parameters: Parameters,
        data: Mapping[str, Tensor],
        total: int,
        named: bool,
    ) -> None:
        self.function, self.parameters, self.named = function, parameters, named
        self.observed, self.covariates, self.total = dict(data), dict[str, Tensor](), total
        self.blocks = parameters.blocks
        self.latents = self.local_sites = list(self.blocks)
        self.kinked: dict[str, tuple[Tensor, Tensor]] = {}
        self.pairs: list[Pair] = []
        self.joint = False

    @property
    def width(self) -> int:
        """Length of a vector."""
        return max(block.stop for block in self.blocks.values())

    def part(self, index: Tensor) -> PlainTarget:
        """The same function with some of the posteriors."""
        return PlainTarget(self.function, self.parameters, self.rows(index)[1], len(index), self.named)

    def rows(self, index: Tensor) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """No covariates, and the data of the posteriors at `index`."""
        return {}, {name: value[index.to(value.device)] for name, value in self.observed.items()}

    def log_density(self, q: Tensor, powers: Tensor, covariates: Values, observed: Values) -> Tensor:
        """The unnormalised log density on the line, `(rows,)`, at vectors `(rows, width)`.

        Args:
            q: the vectors.
            powers: κ of no pairs, `(rows, 0)`.
            covariates: none.
            observed: the data of the vectors.
        """
        values, log_det = self.placed(q)
        return self.called(values, observed) + log_det

    def called(self, values: dict[str, Tensor], observed: Values) -> Tensor:
        given: list[Any] = [values if self.parameters.named else values[WHOLE]]
        if observed:
            given.append(dict(observed) if self.named else observed[GIVEN])
        return self.function(*given)

    def placed(self, q: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        """Values of the parameters, and the log determinant of the map to their supports, `(rows,)`."""
        values, log_det = {}, q.new_zeros(len(q))
        for name, raw in self._split(q).items():
            if name in self.parameters.sites:
                values[name], entries = to_support(self.parameters.sites[name], raw)
                log_det = log_det + entries.reshape(len(q), -1).sum(1)
            else:
                values[name] = raw
        return values, log_det

    def _split(self, q: Tensor) -> dict[str, Tensor]:
        return {name: q[:, b.start : b.stop].reshape(len(q), *b.shape) for name, b in self.blocks.items()}

    def record(
        self, q: Tensor, levels: Tensor, covariates: Values, observed: Values
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Values of the parameters `(rows, *shape)`; and constrained parameter → whether its value is `at_an_edge`."""
        values, _ = self.placed(q)
        raw = self._split(q)
        edges = {
            name: at_an_edge(site, raw[name], values[name]).reshape(len(q), -1).any(1)
            for name, site in self.parameters.sites.items()
        }
        return values, edges

"""What chains need to know of a density: the interface of `target.Target` and of `plain.PlainTarget`."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor

from calibrant.inference.references.target import Block, Pair
from calibrant.program.contract import Values


class Sampled(Protocol):
    """An unnormalised log density on flat unconstrained vectors `(lanes, width)`, with the data of the lanes.

    The attributes and methods are those of `target.Target`.
    """

    observed: dict[str, Tensor]
    covariates: dict[str, Tensor]
    blocks: dict[str, Block]
    kinked: dict[str, tuple[Tensor, Tensor]]
    pairs: list[Pair]
    latents: list[str]
    local_sites: list[str]
    joint: bool
    total: int

    @property
    def width(self) -> int: ...

    def rows(self, index: Tensor) -> tuple[dict[str, Tensor], dict[str, Tensor]]: ...

    def log_density(self, q: Tensor, powers: Tensor, covariates: Values, observed: Values) -> Tensor: ...

    def record(
        self, q: Tensor, levels: Tensor, covariates: Values, observed: Values
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]: ...

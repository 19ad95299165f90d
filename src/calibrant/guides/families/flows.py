"""A conditional normalising flow as a family: neural spline flow, Durkan et al. 2019, arXiv 1906.04032."""

from __future__ import annotations

from typing import Any

import pyro.distributions as dist
import torch
from torch import Tensor, nn
from torch.distributions.transforms import AffineTransform

from calibrant.guides.families.densities import Flat
from calibrant.program.environment import validation_kept

_CONTEXT = 32
_TRANSFORMS = 3
_PASSES = 8


def _spline_flow(*args: int, **kwargs: int) -> Any:
    """Imported where used: it takes long, and turns the validation of distributions off."""
    with validation_kept():
        import zuko

    return zuko.flows.NSF(*args, **kwargs)


class Flow(Flat):
    """A Normal on the line whose standard noise goes through an autoregressive spline flow, conditional on the datum.

    At the start the flow is the identity, so that a fresh guide is the Normal. Up to 8 entries are autoregressive one
    by one, more of them in 8 blocks, since a draw takes one pass of the network a block.
    """

    def __init__(self, event_shape: tuple[int, ...], support: str) -> None:
        super().__init__(event_shape, support)
        entries = self.locations
        self.raw += _CONTEXT
        self.network: Any = _spline_flow(entries, _CONTEXT, transforms=_TRANSFORMS, passes=min(entries, _PASSES))
        for transform in self.network.transform.transforms:
            *_, weight, bias = transform.hyper.parameters()
            nn.init.zeros_(weight)
            nn.init.zeros_(bias)

    def joint(self, loc: Tensor, scale: Tensor, others: Tensor) -> tuple:
        noise = dist.Normal(torch.zeros_like(loc), torch.ones_like(loc)).to_event(1)
        return noise, self.network(others).transform.inv, AffineTransform(loc, scale, event_dim=1)

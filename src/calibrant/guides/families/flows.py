"""The family of conditional normalising flows: neural spline flows, Durkan et al. 2019, arXiv 1906.04032."""

from __future__ import annotations

from typing import Any

import pyro.distributions as dist
import torch
from torch import Tensor, nn
from torch.distributions.transforms import AffineTransform

from calibrant.guides.families.densities import Flat
from calibrant.program.environment import validation_kept

_CONTEXT = 32  # outputs of the head on which the flow is conditioned
_TRANSFORMS = 3  # transforms in the flow
_PASSES = 8  # passes of the network that a draw takes, at most


def _spline_flow(*args: int, **kwargs: int) -> Any:
    """A flow of zuko, which is imported on first use: importing takes long and turns off validation in torch."""
    with validation_kept():
        import zuko

    return zuko.flows.NSF(*args, **kwargs)


class Flow(Flat):
    """A Normal in unconstrained space whose standard noise passes through an autoregressive spline flow, which is
    conditional on the datum.

    At first, the flow is the identity, so that a new guide is that Normal. Up to 8 entries are autoregressive one by
    one; more entries are grouped in 8 blocks, since a draw takes one pass of the network per block.
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

"""Grey values on the grid k/255, k = 0, …, 255: their support, and the base of distributions over them."""

from __future__ import annotations

import pyro.distributions as dist
import torch
from torch import Tensor
from torch.distributions import constraints

from calibrant.models.parts.likelihoods.protocol import NO_SHAPE, Shapes

LEVELS = 256
LAST = LEVELS - 1
_AT_ONCE = 16  # levels in one computation, whose intermediate results need memory
_OFF_GRID = 1e-3  # distance from the grid, in grid steps, that may be rounding: float32 is off by 3e-5 at most


class _GreyValues(constraints.Constraint):
    """The values k/255, k = 0, …, 255, as float32 or float64 computes them."""

    is_discrete = True
    event_dim = 0
    remedy = (
        "its values are k/255, k = 0, …, 255: give 8-bit images divided by 255 (resized while they are 8-bit; the data "
        "set digits with levels=256), or round other values between 0 and 1 by (255 * x).round() / 255"
    )

    def check(self, value: Tensor) -> Tensor:
        level = LAST * value
        nearest = level.round()
        return ((level - nearest).abs() < _OFF_GRID) & (nearest >= 0) & (nearest <= LAST)


grey_values = _GreyValues()


class GreyDistribution(dist.TorchDistribution):
    """Base of the distributions over the 256 grey values k/255, of independent entries.

    `log_mass` is all that has to be written. Mean, variance, distribution function, quantiles and draws follow from the
    table of all 256 probabilities, which is computed only when one of them is asked for.
    """

    arg_constraints: dict[str, constraints.Constraint] = {}
    support = grey_values

    def log_mass(self, level: Tensor) -> Tensor:
        """Log probabilities (nats) of levels k, floats that broadcast against the batch shape."""
        raise NotImplementedError

    def log_masses(self) -> Tensor:
        """Log probabilities of all levels, `(*batch_shape, 256)`."""
        rows = [level.reshape(-1, *[1] * len(self.batch_shape)) for level in self._levels().split(_AT_ONCE)]
        return torch.cat([self.log_mass(level).expand(-1, *self.batch_shape) for level in rows]).movedim(0, -1)

    def cumulative(self, level: Tensor) -> Tensor:
        """Probabilities of all levels up to k, for whole numbers 0 ≤ k < 255 that broadcast to the batch shape."""
        return entry_of(self.log_masses().exp().cumsum(-1), level)

    def log_prob(self, value: Tensor) -> Tensor:
        if self._validate_args:
            self._validate_sample(value)
        return self.log_mass((LAST * value).round())

    def sample(self, sample_shape: Shapes = NO_SHAPE) -> Tensor:
        with torch.no_grad():
            level = dist.Categorical(logits=self.log_masses()).sample(sample_shape)
            return level.to(self._levels().dtype) / LAST

    def cdf(self, value: Tensor) -> Tensor:
        level = (LAST * value + _OFF_GRID).floor()
        share = self.cumulative(level.clamp(0, LAST - 1))
        share = torch.where(level < 0, torch.zeros_like(share), share)
        return torch.where(level >= LAST, torch.ones_like(share), share)

    def icdf(self, value: Tensor) -> Tensor:
        shares = self.log_masses().exp().cumsum(-1)[..., :LAST]
        return (shares < value[..., None]).sum(-1).to(shares.dtype) / LAST

    @property
    def mean(self) -> Tensor:
        return self.log_masses().exp() @ (self._levels() / LAST)

    @property
    def variance(self) -> Tensor:
        deviation = self._levels() / LAST - self.mean[..., None]
        return (self.log_masses().exp() * deviation**2).sum(-1)

    def _levels(self) -> Tensor:
        """The levels 0, …, 255, in the dtype and on the device of the distribution."""
        return torch.arange(LEVELS, dtype=self.like.dtype, device=self.like.device)

    @property
    def like(self) -> Tensor:
        """A tensor with the dtype and device of the distribution."""
        raise NotImplementedError


def entry_of(table: Tensor, level: Tensor) -> Tensor:
    """The entries of a table `(…, 256)` at levels that broadcast against its other dimensions."""
    shape = torch.broadcast_shapes(table.shape[:-1], level.shape)
    index = level.long().expand(shape).unsqueeze(-1)
    return table.expand(*shape, table.shape[-1]).gather(-1, index).squeeze(-1)

"""Von Mises and von Mises–Fisher distributions with reparameterized draws, in any dimension.

Both depend on a point only through the cosine w = 1 − t of its angle to the mean direction. On the sphere of ℝᵖ, with
m = (p − 1)/2, the density of t is proportional to exp(−κt) (t(2 − t))^(m−1). All computations use y = log(t/(2 − t)),
which is twice the logarithm of the tangent of half the angle. The log density of y,

    g(y) = −κt + m log t(2 − t),    t = 2σ(y),

has its mode at σ(y*) = m/(κ + m + √(κ² + m²)), a curvature between m/2 and m at the mode, and tails of slope m or more,
for every concentration. So one quadrature serves every dimension and concentration. Relative to the value at the mode,
the log density can be computed without cancellation, even in float32:

    g(y* + δ) − g(y*) = m (δ − 2 log(1 + σ* e) − (1 − 2σ*) e/(1 + σ* e)),    e = exp(δ) − 1,    σ* = σ(y*).
"""

from __future__ import annotations

from math import asinh, lgamma, log, pi
from typing import Any

import pyro.distributions as dist
import torch
from torch import Tensor
from torch.distributions import constraints

Shape = torch.Size | list[int] | tuple[int, ...]
_NODES = 96  # of the quadrature for the normalising constant
_HALF_LINE = (-3.4, 4.2, 80)  # first node, last node and number of nodes in the quadrature on a half-line
_FARTHEST = 80.0  # largest distance from the mode: e^(−40) in the slowest tail (the circle), no overflow in float32
_PROPOSALS = 24  # each is accepted with probability 0.658 or more; once in 10¹¹ draws, all are rejected


def log_normalizer(dimension: int, concentration: Tensor) -> Tensor:
    """The log density of a von Mises–Fisher distribution at its mean direction, on the unit sphere of ℝᵖ.

    It is log exp(κ) κ^ν / ((2π)^(p/2) I_ν(κ)) with ν = p/2 − 1, computed by the trapezoidal rule in x with
    δ = sinh(x)/√m.

    Args:
        dimension: p, 2 or more.
        concentration: κ ≥ 0, of any shape; the result has the same shape, and derivatives of every order.
    """
    m = (dimension - 1) / 2
    mode, t, log_weights = _nodes(m, concentration.detach())
    # The nodes do not depend on κ in the derivative: any nodes that are dense enough give the integral.
    tilted = log_weights - (concentration - concentration.detach())[..., None] * (t - 2 * mode[..., None])
    height = m * (4 * mode * (1 - mode)).log() - 2 * mode * concentration
    log_rest_of_sphere = log(2) + m * log(pi) - lgamma(m)
    return log(2) - log_rest_of_sphere - height - tilted.logsumexp(-1)


def mean_cosine(dimension: int, concentration: Tensor) -> Tensor:
    """The expected cosine of the angle to the mean direction: I_{p/2}(κ)/I_{p/2−1}(κ), the mean resultant length."""
    return 1 - _mean_t((dimension - 1) / 2, concentration)


def _mode(m: float, concentration: Tensor) -> Tensor:
    """σ(y*), half of t at the mode."""
    return m / (concentration + m + torch.hypot(concentration, torch.full_like(concentration, m)))


def _below_mode(m: float, mode: Tensor, delta: Tensor) -> Tensor:
    """g(y* + δ) − g(y*)."""
    e = delta.expm1()
    return m * (delta - 2 * (mode * e).log1p() - (1 - 2 * mode) * e / (1 + mode * e))


def _t(mode: Tensor, delta: Tensor) -> Tensor:
    """t at y* + δ."""
    return 2 * mode * delta.exp() / (1 + mode * delta.expm1())


def _nodes(m: float, concentration: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """σ(y*); t at the nodes; and the log contributions of the nodes to ∫ exp(g(y) − g(y*)) dy, both `(…, node)`."""
    mode = _mode(m, concentration)
    width = m**-0.5
    reach = asinh(min(_FARTHEST, (160 / m) ** 0.5 + 40 / m) / width)  # where g has fallen by 37
    x = torch.linspace(-reach, reach, _NODES, dtype=concentration.dtype, device=concentration.device)
    delta = width * x.sinh()
    log_step = (2 * reach / (_NODES - 1) * width * x.cosh()).log()
    return mode, _t(mode[..., None], delta), log_step + _below_mode(m, mode[..., None], delta)


def _mean_t(m: float, concentration: Tensor) -> Tensor:
    _, t, log_weights = _nodes(m, concentration)
    return (log_weights.softmax(-1) * t).sum(-1)


# -- draws -------------------------------------------------------------------------------------------------------------


def _draw_log_odds(m: float, concentration: Tensor) -> Tensor:
    """Draws of y, one for each concentration, with their derivative with respect to κ.

    Proposals are y* + log(G/G′) with independent Gamma(m) numbers G and G′ (Ulrich 1984, Wood 1994, who state it with a
    Beta number and the cosine). The derivative is that of a fixed quantile (Figurnov et al. 2018, arXiv 1805.08498).
    """
    with torch.no_grad():
        mode = _mode(m, concentration)
        gammas = torch._standard_gamma(concentration.new_full((2, _PROPOSALS, *concentration.shape), m)).log()
        proposed = gammas[0] - gammas[1]
        envelope = m * (proposed - 2 * (proposed.expm1() / 2).log1p())
        accepted = torch.rand_like(proposed).log() < _below_mode(m, mode, proposed) - envelope
        first = accepted.to(torch.uint8).argmax(0, keepdim=True)
        delta = proposed.gather(0, first)[0]
        log_odds = mode.log() - (-mode).log1p() + delta
    if not torch.is_grad_enabled():
        return log_odds
    slope = _quantile_slope(m, mode, delta, concentration.detach())
    return log_odds + (concentration - concentration.detach()) * slope


def _quantile_slope(m: float, mode: Tensor, delta: Tensor, concentration: Tensor) -> Tensor:
    """dy/dκ at a fixed quantile: ∫ (t − E t) exp(g) up to y, divided by exp(g(y)).

    Beyond the mode, the integral is taken from the other side. It is computed by the trapezoidal rule in x, where the
    distance from y is `length` · exp(x − exp(−x)).
    """
    here = _t(mode, delta)
    slope = (m * (1 - here) - concentration * here * (2 - here) / 2).abs()
    curvature = (here * (2 - here) / 2 * (m + concentration * (1 - here))).clamp_min(0)
    length = 2 / (slope + (slope * slope + 2 * curvature).sqrt()).clamp_min(1e-6)
    x, spacing = torch.linspace(*_HALF_LINE, dtype=delta.dtype, device=delta.device), _HALF_LINE[1] - _HALF_LINE[0]
    distance = length[..., None] * (x - (-x).exp()).exp()
    step = distance * (1 + (-x).exp()) * spacing / (_HALF_LINE[2] - 1)
    side = torch.where(delta < 0, 1.0, -1.0).to(delta)
    there = (delta[..., None] - side[..., None] * distance).clamp(-2 * _FARTHEST, _FARTHEST)
    fall = _below_mode(m, mode[..., None], there) - _below_mode(m, mode, delta)[..., None]
    excess = _t(mode[..., None], there) - _mean_t(m, concentration)[..., None]
    return side * (step * excess * fall.exp()).sum(-1)


class VonMises(dist.TorchDistribution):
    """Von Mises distribution of an angle in radians, with reparameterized draws in [−π, π).

    Args:
        loc: mean direction, radians.
        concentration: κ ≥ 0.
    """

    arg_constraints = {"loc": constraints.real, "concentration": constraints.nonnegative}
    support = constraints.real
    has_rsample = True

    def __init__(self, loc: Tensor, concentration: Tensor, validate_args: bool | None = None) -> None:
        self.loc, self.concentration = torch.broadcast_tensors(loc, concentration)
        super().__init__(self.loc.shape, validate_args=validate_args)

    def expand(self, batch_shape: Shape, _instance: Any = None) -> VonMises:
        """The distribution with another batch shape."""
        loc, concentration = self.loc.expand(batch_shape), self.concentration.expand(batch_shape)
        return VonMises(loc, concentration, validate_args=False)

    def rsample(self, sample_shape: Shape = ()) -> Tensor:
        """Draws `(*sample_shape, *batch_shape)`."""
        shape = self._extended_shape(sample_shape)
        log_odds = _draw_log_odds(0.5, self.concentration.expand(shape))
        side = 1 - 2 * torch.randint_like(log_odds, 2)
        return torch.remainder(self.loc + side * 2 * (log_odds / 2).exp().atan() + pi, 2 * pi) - pi

    def log_prob(self, value: Tensor) -> Tensor:
        """Log density with respect to the angle in radians."""
        if self._validate_args:
            self._validate_sample(value)
        fall = 2 * self.concentration * ((value - self.loc) / 2).sin().square()
        return log_normalizer(2, self.concentration) - fall


class VonMisesFisher(dist.TorchDistribution):
    """Von Mises–Fisher distribution on the unit sphere of ℝᵖ, p ≥ 2, with reparameterized draws.

    The density, with respect to area, is proportional to exp(κ directionᵀx); κ = 0 is the uniform distribution.

    Args:
        direction: unit vectors `(…, p)`.
        concentration: κ ≥ 0, `(…)`.
    """

    arg_constraints = {"direction": dist.constraints.sphere, "concentration": constraints.nonnegative}
    support = dist.constraints.sphere
    has_rsample = True

    def __init__(self, direction: Tensor, concentration: Tensor, validate_args: bool | None = None) -> None:
        batch_shape = torch.broadcast_shapes(direction.shape[:-1], concentration.shape)
        self.direction = direction.expand(*batch_shape, direction.shape[-1])
        self.concentration = concentration.expand(batch_shape)
        super().__init__(batch_shape, direction.shape[-1:], validate_args=validate_args)

    def expand(self, batch_shape: Shape, _instance: Any = None) -> VonMisesFisher:
        """The distribution with another batch shape."""
        direction = self.direction.expand(*batch_shape, *self.event_shape)
        return VonMisesFisher(direction, self.concentration.expand(batch_shape), validate_args=False)

    @property
    def mean(self) -> Tensor:
        """The expectation of x, which lies inside the sphere."""
        return mean_cosine(self.event_shape[0], self.concentration)[..., None] * self.direction

    def rsample(self, sample_shape: Shape = ()) -> Tensor:
        """Draws `(*sample_shape, *batch_shape, p)`.

        Their derivative with respect to the direction is that of the smallest rotation from the old direction to the
        new one. No axis of reference is singled out, so that the gradient is bounded.
        """
        shape = self._extended_shape(sample_shape)
        direction, fixed = self.direction.expand(shape), self.direction.detach().expand(shape)
        half = _draw_log_odds((shape[-1] - 1) / 2, self.concentration.expand(shape[:-1]))[..., None] / 2
        noise = torch.randn_like(fixed)
        side = torch.nn.functional.normalize(noise - _dot(noise, fixed) * fixed, dim=-1)
        drawn = side / half.cosh() - half.tanh() * fixed
        drawn = drawn / drawn.detach().norm(dim=-1, keepdim=True)
        start = drawn.detach()
        turned = (direction - fixed) * _dot(fixed, start) - fixed * _dot(direction - fixed, start)
        return drawn + turned

    def log_prob(self, value: Tensor) -> Tensor:
        """Log density with respect to area, where 1 − directionᵀx is computed as half the squared distance."""
        if self._validate_args:
            self._validate_sample(value)
        fall = self.concentration * (value - self.direction).square().sum(-1) / 2
        return log_normalizer(self.event_shape[0], self.concentration) - fall


def _dot(a: Tensor, b: Tensor) -> Tensor:
    return (a * b).sum(-1, keepdim=True)

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
_SEARCH, _CLOSE = 200, 1e-8  # at most so many steps towards a quantile; after one so small, the error is its square
_PROPOSALS = 24  # each is accepted with probability 0.658 or more; once in 10¹¹ draws, all are rejected


def log_peak_density(dimension: int, concentration: Tensor) -> Tensor:
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


def log_normalizer(dimension: int, concentration: Tensor) -> Tensor:
    """log C(κ) of the von Mises–Fisher density C(κ) exp(κ directionᵀx) on the unit sphere of ℝᵖ.

    It is log κ^ν / ((2π)^(p/2) I_ν(κ)) with ν = p/2 − 1; at κ = 0, minus the log area of the sphere.

    Args:
        dimension: p, 2 or more.
        concentration: κ ≥ 0, of any shape; the result has the same shape, and derivatives of every order. Where κ is
            large, differences of log densities keep more digits with `log_peak_density`, which is log C(κ) + κ.
    """
    return log_peak_density(dimension, concentration) - concentration


def mean_cosine(dimension: int, concentration: Tensor) -> Tensor:
    """The expected cosine of the angle to the mean direction: I_{p/2}(κ)/I_{p/2−1}(κ), the mean resultant length."""
    return 1 - _mean_t((dimension - 1) / 2, concentration)


def cosine_nodes(dimension: int, concentration: Tensor) -> tuple[Tensor, Tensor]:
    """Nodes and weights with which E f(w) = Σ weight · f(node), for w the cosine to the mean direction.

    Args:
        dimension: p, 2 or more.
        concentration: κ ≥ 0, of any shape.

    Returns:
        Cosines and weights `(…, node)`, the weights with the sum 1; exact to rounding for functions that are smooth
        on the scale of the distribution.
    """
    _, t, log_weights = _nodes((dimension - 1) / 2, concentration)
    return 1 - t, log_weights.softmax(-1)


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
    side, step, there, fall = _outwards(m, mode, delta, concentration)
    excess = _t(mode[..., None], there) - _mean_t(m, concentration)[..., None]
    return side * (step * excess * fall.exp()).sum(-1)


def _outwards(m: float, mode: Tensor, delta: Tensor, concentration: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Nodes from y* + δ away from the mode, for the integral of exp(g(y)) from there on.

    Returns:
        1 below the mode and −1 above it, in the shape of `delta`; and of the nodes `(…, node)`: their weights, their
        distances from y*, and g at the nodes minus g(y* + δ).
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
    return side, step, there, fall


# -- caps --------------------------------------------------------------------------------------------------------------


def cap_probability(dimension: int, concentration: Tensor, cosine: Tensor) -> Tensor:
    """The probability that a von Mises–Fisher point lies in the cap of points with at least this cosine to its mean.

    At a point that is drawn from the distribution, it is uniform on [0, 1].

    Args:
        dimension: p, 2 or more.
        concentration: κ ≥ 0.
        cosine: of the angle between the mean direction and the edge of the cap, between −1 and 1.

    Returns:
        Probabilities in float64, in the shape to which both broadcast. They have no gradient.
    """
    with torch.no_grad():
        kappa, cos = torch.broadcast_tensors(concentration.double(), cosine.double())
        m = (dimension - 1) / 2
        tiny = torch.finfo(torch.float64).tiny
        log_odds = (1 - cos).clamp_min(tiny).log() - (1 + cos).clamp_min(tiny).log()
        mode, log_total = _total(m, kappa)
        return _cap(m, kappa, mode, log_total, log_odds - mode.logit())[0]


def cap_cosine(dimension: int, concentration: Tensor, level: float | Tensor) -> Tensor:
    """The cosine at the edge of the cap around the mean direction that holds a von Mises–Fisher point with probability.

    It is the (1 − level) quantile of the cosine to the mean direction, by Newton's method on the exact distribution.

    Args:
        dimension: p, 2 or more.
        concentration: κ ≥ 0, of any shape.
        level: probability of the cap, between 0 and 1 and neither of them; a number, or a tensor that broadcasts.

    Returns:
        Cosines in float64, in the shape to which concentration and level broadcast. They have no gradient.
    """
    with torch.no_grad():
        wanted = torch.as_tensor(level, dtype=torch.float64, device=concentration.device)
        kappa, wanted = torch.broadcast_tensors(concentration.double(), wanted)
        m = (dimension - 1) / 2
        mode, log_total = _total(m, kappa)
        delta = torch.zeros_like(kappa)
        low, high = delta - _FARTHEST, delta + _FARTHEST
        for _ in range(_SEARCH):
            inside, density = _cap(m, kappa, mode, log_total, delta)
            low, high = torch.where(inside < wanted, delta, low), torch.where(inside < wanted, high, delta)
            step = (inside.logit() - wanted.logit()) * inside * (1 - inside) / density
            found, arrived = delta - step, step.abs() < _CLOSE
            delta = torch.where(arrived | (found > low) & (found < high), found, (low + high) / 2)
            if bool(arrived.all()):
                break
        return 1 - _t(mode, delta)


def _total(m: float, concentration: Tensor) -> tuple[Tensor, Tensor]:
    """σ(y*), and the log of ∫ exp(g(y) − g(y*)) dy."""
    mode, _, log_weights = _nodes(m, concentration)
    return mode, log_weights.logsumexp(-1)


def _cap(m: float, concentration: Tensor, mode: Tensor, log_total: Tensor, delta: Tensor) -> tuple[Tensor, Tensor]:
    """The probability of y ≤ y* + δ, and the density of y there."""
    delta = delta.clamp(-_FARTHEST, _FARTHEST)
    density = (_below_mode(m, mode, delta) - log_total).exp()
    side, step, _, fall = _outwards(m, mode, delta, concentration)
    beyond = density * (step * fall.exp()).sum(-1)
    return torch.where(side > 0, beyond, 1 - beyond), density


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
        return log_peak_density(2, self.concentration) - fall


class _Directions(type(dist.constraints.sphere)):  # type: ignore[misc]
    """Unit vectors to the precision of float32, in which draws are kept that computations in float64 start from."""

    def check(self, value: Tensor) -> Tensor:
        tolerance = self.reltol * torch.finfo(torch.float32).eps * value.shape[-1] ** 0.5
        return (value.norm(dim=-1) - 1).abs() < tolerance


class VonMisesFisher(dist.TorchDistribution):
    """Von Mises–Fisher distribution on the unit sphere of ℝᵖ, p ≥ 2, with reparameterized draws.

    The density, with respect to area, is proportional to exp(κ directionᵀx); κ = 0 is the uniform distribution.

    Args:
        direction: unit vectors `(…, p)`.
        concentration: κ ≥ 0, `(…)`.
    """

    arg_constraints = {"direction": _Directions(), "concentration": constraints.nonnegative}
    support = _Directions()
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
        return log_peak_density(self.event_shape[0], self.concentration) - fall


def _dot(a: Tensor, b: Tensor) -> Tensor:
    return (a * b).sum(-1, keepdim=True)

"""Starts that lie hopelessly far from the posterior come nearer, by a short ascent of the log density.

Under wide or improper priors, a draw of the prior can lie millions of nats below the posterior. Chains that have to
travel from there take a large part of all leapfrogs, and leave draws from which no metric can be learnt.

The ascent must not choose where chains sample. Starts have to stay wider than the posterior, since R-hat sees a missed
part of it by chains that come from different places; and the highest densities can lie where there is next to no mass,
as in the neck of a funnel. A start therefore moves only if it is more than 1,000 (1 + d) nats below what its own ascent
reaches, for vectors of width d, and only up to that level. This is more than a spike can gain in float64, whose
smallest scale is exp(−745) in each dimension. Chains that moved start some 45 √d standard deviations from the mode of a
Normal posterior.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from calibrant.inference.references.nuts import with_slope
from calibrant.inference.references.target import Target

_SLACK = 1000.0  # nats, once and for each dimension, by which a start may lie below what its ascent reaches
_AHEAD = 10  # evaluations of the density over which an ascent that gains no more than this is over
_MOST = 150  # evaluations of the density at most; starts whose ascents go on stay where they are
_PAIRS = 8  # steps of an ascent, with changes of the gradient, that tell the curvature
_HALVINGS = 60  # of the last step at most, whose end can lie far within the posterior
_ENOUGH, _SHORTER = 1e-4, 0.3  # share of the expected gain that a step has to make; factor for steps that do not
_ROWS = {"cpu": 2048, "cuda": 65_536}  # starts in one evaluation of the density

Slope = Callable[[Tensor], tuple[Tensor, Tensor]]


def approached(target: Target, starts: Tensor) -> Tensor:
    """Starts at κ = 0, `(unit, chain, width)`, of which those that are hopelessly far away have come nearer.

    Each is a function of its own start and datum.
    """
    units, chains, width = starts.shape
    flat, unit = starts.reshape(-1, width), torch.arange(units, device=starts.device).repeat_interleave(chains)
    rows, found = _ROWS[starts.device.type], []
    for some, own in zip(flat.split(rows), unit.split(rows), strict=True):
        given = (target.covariates, target.observed) if target.joint else target.rows(own)
        powers = some.new_zeros(len(some), len(target.pairs))

        def value(q: Tensor, powers: Tensor = powers, given: tuple[dict[str, Tensor], ...] = given) -> Tensor:
            return target.log_density(q, powers, *given)

        found.append(_nearer(value, some, _SLACK * (1 + width)))
    return torch.cat(found).reshape(starts.shape)


@dataclass
class _Ascents:
    """Ascents by L-BFGS (Nocedal 1980), one for every row, each with a step length of its own."""

    q: Tensor  # (n, d): positions, with log density and gradient
    value: Tensor
    slope: Tensor
    steps: Tensor  # (n, pair, d): latest steps, newest first; changes of the gradient; 1 / their products, 0 for none
    turns: Tensor
    weight: Tensor
    scale: Tensor  # (n,): first guess of the inverse curvature
    direction: Tensor  # (n, d)
    length: Tensor  # (n,): share of the direction to be tried


def _nearer(value: Callable[[Tensor], Tensor], starts: Tensor, slack: float) -> Tensor:
    """The first points of ascents from starts `(n, d)` that lie less than `slack` below the following points."""
    slope_at = _finite_slope(value)
    state = _begun(slope_at, starts)
    inside, outside, level = starts.clone(), starts.clone(), state.value - slack
    going = state.value.isfinite()  # other starts are replaced when chains begin
    path = deque([(starts, starts, state.value)], maxlen=_AHEAD + 1)
    for _ in range(_MOST):
        before = state.q
        state = _step(slope_at, state)
        path.append((state.q, before, state.value))
        if len(path) <= _AHEAD:
            continue
        there, last, height = path[0]
        arrived = going & (state.value - height <= slack)
        inside[arrived], outside[arrived] = there[arrived], last[arrived]
        level[arrived] = state.value[arrived] - slack
        going &= ~arrived
        if not going.any():
            break
    return _between(value, outside, inside, level, 0.1 * slack)


def _finite_slope(value: Callable[[Tensor], Tensor]) -> Slope:
    """The log density and its gradient; −∞ and 0 where they are not finite."""

    def slope_at(q: Tensor) -> tuple[Tensor, Tensor]:
        found, slope = with_slope(value, q)
        known = found.isfinite() & slope.isfinite().all(-1)
        return found.masked_fill(~known, -torch.inf), slope.masked_fill(~known[:, None], 0.0)

    return slope_at


def _begun(slope_at: Slope, starts: Tensor) -> _Ascents:
    value, slope = slope_at(starts)
    none = starts.new_zeros(len(starts), _PAIRS, starts.shape[1])
    scale = 1 / slope.norm(dim=-1).clamp_min(1e-300)  # the first step has length one
    direction = slope * scale[:, None]
    return _Ascents(starts, value, slope, none, none, none[..., 0], scale, direction, torch.ones_like(scale))


def _step(slope_at: Slope, state: _Ascents) -> _Ascents:
    """Try a step of every ascent: it is taken where the density rises enough; elsewhere the next one is shorter."""
    step = state.length[:, None] * state.direction
    q = state.q + step
    value, slope = slope_at(q)
    expected = (state.slope * step).sum(-1)
    taken = state.value.isfinite() & (value >= state.value + _ENOUGH * expected)
    turn = state.slope - slope
    product, size = (step * turn).sum(-1), turn.square().sum(-1)
    bends = taken & (product > 1e-10 * step.norm(dim=-1) * size.sqrt())
    weight = 1 / product.masked_fill(~bends, 1.0)
    steps, turns, weights = (
        torch.where(bends.reshape(-1, *[1] * (old.dim() - 1)), torch.cat([new[:, None], old[:, :-1]], 1), old)
        for new, old in ((step, state.steps), (turn, state.turns), (weight, state.weight))
    )
    straight = torch.where(taken, 2 * state.scale, state.scale)
    scale = torch.where(bends, product / size.clamp_min(1e-300), straight)
    moved = _Ascents(
        torch.where(taken[:, None], q, state.q),
        torch.where(taken, value, state.value),
        torch.where(taken[:, None], slope, state.slope),
        steps,
        turns,
        weights,
        scale,
        state.direction,
        torch.where(taken, 1.0, _SHORTER * state.length),
    )
    moved.direction = torch.where(taken[:, None], _uphill(moved), state.direction)
    return moved


def _uphill(state: _Ascents) -> Tensor:
    """The direction of L-BFGS, by its two loops; the gradient, scaled, where that does not lead upwards."""
    direction, shares = state.slope, []
    for pair in range(_PAIRS):
        share = state.weight[:, pair] * (state.steps[:, pair] * direction).sum(-1)
        direction = direction - share[:, None] * state.turns[:, pair]
        shares.append(share)
    direction = direction * state.scale[:, None]
    for pair in reversed(range(_PAIRS)):
        other = state.weight[:, pair] * (state.turns[:, pair] * direction).sum(-1)
        direction = direction + (shares[pair] - other)[:, None] * state.steps[:, pair]
    leads = ((direction * state.slope).sum(-1) > 0) & direction.isfinite().all(-1)
    return torch.where(leads[:, None], direction, state.slope * state.scale[:, None])


@torch.no_grad()
def _between(
    value: Callable[[Tensor], Tensor], outside: Tensor, inside: Tensor, level: Tensor, tolerance: float
) -> Tensor:
    """Points up to `tolerance` above a level, on lines from points below to points above; inside where they are one."""
    low, high = torch.zeros_like(level), torch.ones_like(level)
    left = (outside != inside).any(-1)
    for _ in range(_HALVINGS):
        if not left.any():
            break
        middle = 0.5 * (low + high)
        height = value(outside + middle[:, None] * (inside - outside)) - level
        low = torch.where(left & ~(height >= 0), middle, low)
        high = torch.where(left & (height >= 0), middle, high)
        left = left & ~((height >= 0) & (height < tolerance))
    return torch.where((high < 1)[:, None], outside + high[:, None] * (inside - outside), inside)

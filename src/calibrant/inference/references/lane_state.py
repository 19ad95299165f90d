"""The state of all lanes, and operations that few lanes need at a time: warm-up windows, new starts, new noise."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from calibrant.inference.references import adaptation
from calibrant.inference.references.adaptation import Adaptation
from calibrant.inference.references.metrics import metric
from calibrant.inference.references.nuts import (
    FIRST_STEP,
    FRESH,
    MOMENTUM,
    OVER,
    PLACES,
    RESTART,
    STARTS,
    TENDED,
    WAITING,
    Ended,
    Fixed,
    Lanes,
    Plan,
)
from calibrant.inference.references.random_numbers import fold, standard_normal, stream, uniform


@dataclass
class State:
    """The state of all lanes."""

    key: Tensor  # (lane,): random key
    momentum_key: Tensor  # (lane,): random key of the noise of momenta
    clock: Tensor  # (lane,): number of steps so far, which is the counter of the random stream
    lanes: Lanes
    fixed: Fixed
    adaptation: Adaptation
    attempts: Tensor  # (lane,): number of starts tried
    noisy: Tensor  # (lane,): number of iterations whose noise has been drawn
    lost: Tensor  # (lane,): whether no start had a finite density
    moved: Tensor  # (lane,): how often the lane was moved to the place of another chain of its datum


def init(key: Tensor, q: Tensor, powers: Tensor, rows: dict[str, Tensor], plan: Plan, dense: bool = False) -> State:
    """New lanes, where the chains of a datum are in adjacent lanes.

    Args:
        key: random key of every lane, `(lane,)`.
        q: starts of the lanes, `(lane, d)`, in coordinates with these powers.
        powers: κ of every lane and pair, `(lane, pair)`.
        rows: covariates and observations of every lane.
        plan: settings of all chains.
        dense: whether the metric is dense.
    """
    size, width = q.shape
    number, whole, flag = q.new_zeros(size), key.new_zeros(size), torch.zeros_like(key, dtype=torch.bool)
    vector, special = torch.zeros_like(q), {"phase": whole + FRESH, "forward": flag, "q": q}
    integers = ("depth", "leaf", "leaves", "iteration")
    vectors = ("p", "grad", "tree_q", "tree_grad", "tree_momentum", "sub_q", "sub_grad", "sub_momentum")
    values: dict[str, Tensor] = {field.name: number for field in fields(Lanes)}
    values |= dict.fromkeys(integers, whole) | dict.fromkeys(vectors, vector) | special
    values |= {name: q.new_zeros(size, 3, width) for name in ("first", "last")}
    values |= {"step_size": number + FIRST_STEP, "centre": (10 * (number + FIRST_STEP)).log()}
    unit = torch.eye(width, dtype=q.dtype, device=q.device) if dense else q.new_ones(width)
    unit = unit.expand(size, *unit.shape)
    fixed = Fixed(
        checks=q.new_zeros(size, 2, width, PLACES),
        checked=q.new_zeros(size, PLACES),
        noise=q.new_zeros(size, TENDED + 1, width),
        powers=powers.clone(),
        metric=unit.clone(),
        factor=unit.clone(),
        rows=rows,
    )
    candidates = plan.coordinates.table.shape[1] if plan.choose_powers else 1
    known = adaptation.start(q, plan.schedule.windows, candidates, powers.shape[1], dense)
    lanes = Lanes(**{name: value.clone() for name, value in values.items()})
    clock, attempts, noisy, moved = (whole.clone() for _ in range(4))
    state = State(key, fold(key, MOMENTUM), clock, lanes, fixed, known, attempts, noisy, flag.clone(), moved)
    _draw_noise(state)
    return state


def select(state: State, index: Tensor) -> State:
    """The state of some lanes."""
    return _map(lambda value: value[index], state)


def put(state: State, index: Tensor, part: State) -> None:
    """Replace the state of some lanes."""
    for old, new in zip(_tensors(state), _tensors(part), strict=True):
        old[index] = new


def _map(function: Callable[[Tensor], Tensor], part: Any) -> Any:
    if isinstance(part, Tensor):
        return function(part)
    if isinstance(part, dict):
        return {name: _map(function, value) for name, value in part.items()}
    return type(part)(**{field.name: _map(function, getattr(part, field.name)) for field in fields(part)})


def _tensors(part: Any) -> list[Tensor]:
    found: list[Tensor] = []
    _map(lambda value: found.append(value) or value, part)  # type: ignore[func-returns-value]
    return found


def tend(state: State, ended: Ended, plan: Plan) -> None:
    """Update the state in place after `TENDED` steps: learn from warm-up, close windows, retry starts, draw noise.

    `ended` are the iterations that ended in these steps, from `joined`.
    """
    _contribute(state, ended, plan)
    phase = state.lanes.phase
    _retry(state, (phase == FRESH).nonzero()[:, 0], plan)
    waiting = (phase == WAITING).nonzero()[:, 0]
    if len(waiting):
        _go_on(state, waiting, plan)
    _draw_noise(state)


def _go_on(state: State, index: Tensor, plan: Plan) -> None:
    """Let lanes go on that wait at the end of a window or of warm-up; their density is evaluated again."""
    lanes = state.lanes
    lanes.q[index] = lanes.tree_q[index]
    closes = plan.schedule.closes.to(index.device)[lanes.iteration[index] - 1]
    if closes.any():
        _close_window(state, index[closes], plan)
    if not closes.all():
        _settle_step_size(state, index[~closes], plan)
    lanes.grad[index] = lanes.p[index] = 0.0
    lanes.phase[index] = FRESH


def _contribute(state: State, ended: Ended, plan: Plan) -> None:
    """Add iterations of warm-up to their windows; `ended` has the iterations of several steps, in order."""
    size = len(state.key)
    window = pad(plan.schedule.window, (0, 1), value=-1).to(ended.over.device)[ended.iteration.clamp_max(plan.warmup)]
    place = (ended.over & (window >= 0)).nonzero()[:, 0]
    if not len(place):
        return
    lane = place % size
    q, grad, powers = ended.q[place], ended.grad[place], state.fixed.powers[lane]
    vectors, slopes = torch.stack([q, grad], 1)[:, :, None], q.new_zeros(len(q), powers.shape[1], 1)
    if plan.choose_powers:
        vectors, slopes = plan.coordinates.in_all(q, grad, powers)
    adaptation.contribute(state.adaptation, lane, window[place], vectors, slopes, ended.log_density[place])


def _retry(state: State, index: Tensor, plan: Plan) -> None:
    """New starts, uniform in (−2, 2), for lanes whose start has no finite density; sub-chains keep a common start."""
    if not len(index):
        return
    lanes = state.lanes
    state.attempts[index] += 1
    common = index // plan.subchains * plan.subchains
    key = fold(fold(state.key[common], RESTART), state.attempts[index])[:, None]
    lanes.q[index] = 4 * uniform(key, torch.arange(lanes.q.shape[1], device=key.device)) - 2
    lanes.grad[index] = lanes.p[index] = 0.0
    hopeless = index[state.attempts[index] >= STARTS]
    state.lost[hopeless], lanes.phase[hopeless] = True, OVER


def _close_window(state: State, index: Tensor, plan: Plan) -> None:
    """New metric and coordinates for lanes at the end of a window."""
    lanes, fixed, where = state.lanes, state.fixed, plan.coordinates
    window = plan.schedule.window.to(index.device)[lanes.iteration[index] - 1]
    chains = _chains_of(index, plan)
    _rescue(state, index, chains, window, plan)
    count, variance, slopes = adaptation.pooled(state.adaptation, chains, window)
    if plan.choose_powers:
        before = fixed.powers[index]
        draws = variance[:, 0].diagonal(dim1=-2, dim2=-1) if variance.dim() == 5 else variance[:, 0]
        best = adaptation.choose(count, draws, slopes, where.table, where.pair_of, before)
        variance = _of_candidates(variance, best[:, where.decides])
        after = where.table.gather(1, best.T).T
        lanes.q[index] = where.move(lanes.q[index], before, after)
        fixed.powers[index] = after
    else:
        variance = variance[:, :, 0]
    fixed.metric[index] = metric(count, variance[:, 0], variance[:, 1], fixed.metric[index])
    fixed.factor[index] = _mass_factor(fixed.metric[index])
    lanes.step_size[index] = lanes.q.shape[1] ** -0.25
    lanes.centre[index] = (10 * lanes.step_size[index]).log()
    for name in ("error", "average", "count"):
        getattr(lanes, name)[index] = 0.0


def _settle_step_size(state: State, index: Tensor, plan: Plan) -> None:
    """The step size of lanes at the end of warm-up: the mean of those that the chains of the datum have found so far.

    Logarithms are weighted by the number of iterations since the last metric. One chain learns its step size from few
    iterations, and one with far smaller steps than the others would end long after them.
    """
    lanes, chains = state.lanes, _chains_of(index, plan)
    weight = lanes.count[chains] * (lanes.iteration[chains] > plan.schedule.last)
    lanes.step_size[index] = ((weight * lanes.average[chains]).sum(1) / weight.sum(1)).exp()


def _chains_of(index: Tensor, plan: Plan) -> Tensor:
    """All lanes of the datum of each lane, `(n, chain)`."""
    return torch.arange(plan.chains, device=index.device) + (index // plan.chains * plan.chains)[:, None]


def _of_candidates(variance: Tensor, chosen: Tensor) -> Tensor:
    """Variances `(n, 2, d)`, or covariances `(n, 2, d, d)`, in the candidate that is chosen for every entry, `(n, d)`.

    Covariances of entries with different candidates are not known, and set to zero.
    """
    place = chosen[:, None, None].expand(-1, 2, -1, -1)
    if variance.dim() == 4:
        return variance.gather(2, place)[:, :, 0]
    found = variance.gather(2, place[..., None].expand(*place.shape, variance.shape[-1]))[:, :, 0]
    return found * (chosen[:, None, :, None] == chosen[:, None, None, :])


def _rescue(state: State, index: Tensor, chains: Tensor, window: Tensor, plan: Plan) -> None:
    """Move waiting chains that are stuck in a place without mass to another chain of their datum.

    Their contributions to the window are deleted. Without this, one chain in a negligible mode, which is due to its
    start, would make its datum fail the gate, and its long trees would delay all other lanes.
    """
    lanes, powers = state.lanes, state.fixed.powers
    astray, other = adaptation.stray(state.adaptation, index, chains, window)
    astray = astray & plan.schedule.settled.to(index.device)[window]
    lane, other = index[astray], other[astray]
    if len(lane):
        fresh = (lanes.phase[other] == FRESH)[:, None]  # its position is `q`, in its own coordinates
        there = torch.where(fresh, lanes.q[other], lanes.tree_q[other])
        lanes.q[lane] = plan.coordinates.move(there, powers[other], powers[lane])
        adaptation.forget(state.adaptation, lane, window[astray])
        state.moved[lane] += 1


def _mass_factor(metric: Tensor) -> Tensor:
    """F with F Fᵀ = mass matrix, computed from the inverse mass matrix."""
    if metric.dim() == 2:
        return metric.rsqrt()
    eye = torch.eye(metric.shape[-1], dtype=metric.dtype, device=metric.device)
    return torch.linalg.solve_triangular(torch.linalg.cholesky(metric).mT, eye.expand_as(metric), upper=True)


def _draw_noise(state: State) -> None:
    """Draw the noise of momenta for all iterations that may begin before the next call."""
    lanes, noise = state.lanes, state.fixed.noise
    places, width = noise.shape[1:]
    ahead = lanes.iteration[:, None] + torch.arange(places, device=noise.device)
    lane, number = (ahead >= state.noisy[:, None]).nonzero().unbind(1)
    ahead = ahead[lane, number]
    counter = ahead[:, None] * width + torch.arange(width, device=noise.device)
    noise[lane, ahead % places] = standard_normal(stream(state.momentum_key[lane, None], counter))
    state.noisy = lanes.iteration + places

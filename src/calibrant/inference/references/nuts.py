"""The No-U-Turn sampler for many posteriors at once, where each chain builds its own tree.

`lane_state.init` creates the state of all lanes (a lane is one chain of one datum), and `step` moves every lane by one
leapfrog. Lanes are not synchronised: one may be at the first leapfrog of its third iteration while another completes
its hundredth tree, so that no lane waits for the longest tree. A step is a function of tensors without control flow, so
that it can be recorded and compiled. Operations that few lanes need at a time are done by `lane_state.tend` after every
`TENDED` steps.

The transition is multinomial NUTS with the generalised U-turn criterion (Betancourt 2017, arXiv 1701.02434, appendix
A.4). Trees are built iteratively: at a leaf, each subtree that ends there is checked against the momentum stored at its
first leaf. The sum of momenta in the criterion counts the two ends by half (trapezoidal rule); otherwise, trajectories
on independent Normal targets might turn only after a second lap.

Random numbers are a function of (seed, datum, chain, counter), so that the draws of a lane don't depend on other lanes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from calibrant.inference.references import adaptation
from calibrant.inference.references.adaptation import Schedule
from calibrant.inference.references.coordinates import from_normal, to_normal
from calibrant.inference.references.random_numbers import stream, to_uniform

MAX_DEPTH = 10  # doublings of a tree at most
TENDED = 8  # steps between two calls of `lane_state.tend`
MOVING, FRESH, WAITING, OVER = range(4)  # phases of a lane
_DIVERGENCE = 1000.0  # nats of energy error above which a transition is divergent
STARTS = 100  # starts that are tried per lane
FIRST_STEP = 0.1  # initial step size
MOMENTUM, RESTART = range(2)  # folded into the key of a lane, for random numbers outside its stream
_BITS = torch.tensor([((n >> 1).bit_count(), (n ^ (n + 1)).bit_count() - 1) for n in range(1 << MAX_DEPTH)])
Density = Callable[[Tensor, Tensor, dict[str, Tensor]], Tensor]


@dataclass
class Lanes:
    """The state of all lanes; the first dimension of every tensor is the lane, and `d` is the width of a vector.

    A lane is `MOVING`; or `FRESH`, at a point whose density has to be evaluated; or `WAITING` at the end of a window
    for `lane_state.tend`; or `OVER`.
    """

    key: Tensor
    clock: Tensor  # number of steps so far, which is the counter of the random stream
    phase: Tensor
    q: Tensor  # (lane, d): moving end of the trajectory, with its momentum p and gradient
    p: Tensor
    grad: Tensor
    log_density: Tensor
    forward: Tensor  # whether the moving end is the last in time
    first: Tensor  # (lane, 3, d): position, momentum and gradient at the two ends of the trajectory
    last: Tensor
    energy: Tensor  # energy at the start of the iteration
    depth: Tensor  # number of doublings so far
    leaf: Tensor  # number of leaves of the growing subtree
    tree_q: Tensor  # point drawn from the trajectory; then weight and sum of momenta of the trajectory
    tree_grad: Tensor
    tree_density: Tensor
    tree_weight: Tensor
    tree_momentum: Tensor
    sub_q: Tensor  # the same for the growing subtree
    sub_grad: Tensor
    sub_density: Tensor
    sub_weight: Tensor
    sub_momentum: Tensor
    acceptance: Tensor  # acceptance probabilities, summed over the leaves of the iteration
    leaves: Tensor
    iteration: Tensor
    step_size: Tensor
    centre: Tensor  # dual averaging: log step size towards which to shrink; mean error; average log step size; count
    error: Tensor
    average: Tensor
    count: Tensor


@dataclass
class Fixed:
    """Tensors that `lane_state.tend` writes and a step reads; a step writes only `checks` and `checked`, in place."""

    checks: Tensor  # (lane, 2, MAX_DEPTH + 1, d): momentum, and sum of momenta before it, at first leaves of subtrees
    checked: Tensor  # (lane, MAX_DEPTH + 1): product of the two under the metric
    noise: Tensor  # (lane, TENDED + 1, d): noise of the momenta of this iteration and the next ones
    powers: Tensor  # (lane, pair): κ of the lane's coordinates
    metric: Tensor  # (lane, d) or (lane, d, d): inverse mass
    factor: Tensor  # shape of metric: factor · noise is a momentum
    rows: dict[str, Tensor]  # covariates and observations of the lane


_OWN = [field.name for field in fields(Fixed) if field.name != "rows"]


@dataclass(frozen=True)
class Ended:
    """Iterations that ended in one step; the values of a lane are valid only if `over` (lane,) is True there."""

    over: Tensor
    iteration: Tensor
    q: Tensor
    log_density: Tensor
    energy: Tensor
    acceptance_rate: Tensor
    step_size: Tensor
    n_steps: Tensor
    diverging: Tensor


def joined(ended: list[Ended]) -> Ended:
    """Concatenate the iterations that ended in several steps, step by step."""
    return Ended(*(torch.cat(parts) for parts in zip(*map(_flat, ended), strict=True)))


@dataclass(frozen=True)
class Plan:
    """The settings of all chains."""

    schedule: Schedule
    iterations: int
    chains: int
    target_accept: float
    coordinates: Coordinates
    choose_powers: bool
    depth: int = MAX_DEPTH

    @property
    def warmup(self) -> int:
        """Number of warm-up iterations."""
        return len(self.schedule.window)


@dataclass(frozen=True)
class Coordinates:
    """The coordinates of a lane: (z − m)·s^κ; or, at κ = 0, z itself, and the Normal quantile for a Laplace latent.

    Attributes:
        table: candidates for κ, `(pair, k)`.
        pair_of: pair of every entry of a vector, −1 for none.
        kinked: whether an entry belongs to a Laplace latent.
        loc: location of the Laplace prior of every entry.
        scale: scale of the Laplace prior of every entry.
        offset: constant part of m for every entry.
        centre_of: index of the entry that is added to `offset` in m, −1 for none.
        scale_of: index of the entry log s of every pair.
    """

    table: Tensor
    pair_of: Tensor
    kinked: Tensor
    loc: Tensor
    scale: Tensor
    offset: Tensor
    centre_of: Tensor
    scale_of: Tensor

    def first(self) -> Tensor:
        """Initial κ, `(pair,)`: the middle candidate, or 0 (Normal quantiles) for Laplace latents."""
        normal = torch.zeros(len(self.table) + 1, dtype=torch.bool, device=self.table.device)
        normal[self.pair_of[self.kinked]] = True
        return self.table[:, 1].masked_fill(normal[:-1], 0.0)

    def other(self, powers: Tensor) -> Tensor:
        """The candidates for κ to try next if chains with these powers `(n, pair)` diverge."""
        index = (powers[..., None] == self.table).int().argmax(-1)
        following = torch.tensor([1, 2, 1], device=index.device)[index]
        return self.table.expand(*index.shape, -1).gather(-1, following[..., None])[..., 0]

    def in_all(self, q: Tensor, powers: Tensor) -> tuple[Tensor, Tensor]:
        """Convert vectors `(n, d)` of lanes with these powers to all candidate coordinates, `(n, k, d)`.

        Also returns log|dv/dz|, summed over the entries of a pair, `(n, pair, k)`.
        """
        plain, log_scale = self.plain(q, powers), q[:, self.scale_of]
        found, slopes = [], []
        for candidate in self.table.unbind(1):
            found.append(self._held(plain, log_scale, candidate.expand_as(powers)))
            by_entry = self._spread(candidate * log_scale)
            normal = self._is_normal(candidate.expand_as(powers))
            if normal.any():
                by_entry = torch.where(normal, -from_normal(found[-1], self.loc, self.scale)[1], by_entry)
            inside = self.pair_of == torch.arange(len(self.table), device=q.device)[:, None]
            slopes.append((by_entry[:, None] * inside).sum(-1))
        return torch.stack(found, 1), torch.stack(slopes, -1)

    def move(self, q: Tensor, before: Tensor, after: Tensor) -> Tensor:
        """Convert vectors `(n, d)` from coordinates with the powers `before` to the powers `after`."""
        return self._held(self.plain(q, before), q[:, self.scale_of], after) if len(self.table) else q

    def plain(self, q: Tensor, powers: Tensor) -> Tensor:
        """Convert vectors of lanes with these powers to z itself (Laplace latents without a pair stay quantiles)."""
        if not len(self.table):
            return q
        powered = q * self._spread(-powers * q[:, self.scale_of]).exp() + self._centre(q, powers)
        if not self._has_kinks:
            return powered
        return torch.where(self._is_normal(powers), from_normal(q, self.loc, self.scale)[0], powered)

    @cached_property
    def _has_kinks(self) -> bool:
        """Whether there are Laplace latents; known before a step is recorded."""
        return bool(self.kinked.any())

    def _held(self, plain: Tensor, log_scale: Tensor, powers: Tensor) -> Tensor:
        powered = (plain - self._centre(plain, powers)) * self._spread(powers * log_scale).exp()
        normal = self._is_normal(powers)
        return torch.where(normal, to_normal(plain, self.loc, self.scale), powered) if normal.any() else powered

    def _centre(self, q: Tensor, powers: Tensor) -> Tensor:
        """m, or zero at κ = 0; the entries from which it is computed are in no pair."""
        return (self.offset + pad(q, (0, 1))[:, self.centre_of]) * (self._spread(powers) != 0)

    def _is_normal(self, powers: Tensor) -> Tensor:
        return self.kinked & (self.pair_of >= 0) & (self._spread(powers) == 0)

    def _spread(self, by_pair: Tensor) -> Tensor:
        """Expand values of pairs `(…, pair)` to entries `(…, d)`; entries without a pair get zero."""
        return pad(by_pair, (0, 1))[..., self.pair_of]


def velocity(metric: Tensor, p: Tensor) -> Tensor:
    """Inverse mass, diagonal or dense, times momentum."""
    return metric * p if metric.dim() == p.dim() else (metric @ p[..., None])[..., 0]


def kinetic(metric: Tensor, p: Tensor) -> Tensor:
    """Kinetic energy, `(lane,)`."""
    return 0.5 * (p * velocity(metric, p)).sum(-1)


def turns_back(metric: Tensor, first: Tensor, last: Tensor, momentum: Tensor) -> Tensor:
    """Whether the ends of a trajectory move towards each other (Betancourt 2017), with the ends counted by half."""
    along = velocity(metric, momentum - 0.5 * (first + last))
    return ((first * along).sum(-1) <= 0) | ((last * along).sum(-1) <= 0)


def leapfrog(
    slope_at: Callable[[Tensor], tuple[Tensor, Tensor]],
    q: Tensor,
    p: Tensor,
    grad: Tensor,
    time: Tensor,
    metric: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """One step of the leapfrog integrator; returns position, momentum, gradient and log density."""
    half = p + 0.5 * time[:, None] * grad
    q = q + time[:, None] * velocity(metric, half)
    log_density, grad = slope_at(q)
    return q, half + 0.5 * time[:, None] * grad, grad, log_density


def takes_leaf(delta: Tensor, log_weight: Tensor, level: Tensor) -> Tensor:
    """Whether a leaf of log weight `delta` replaces the point drawn from leaves of total weight `log_weight`."""
    return level.log() < delta - log_weight


def step_function(density: Density, plan: Plan, names: tuple[str, ...]) -> Callable[..., tuple[Tensor, ...]]:
    """The step as a function of tensors, to be recorded: fields of `Lanes`, fields of `Fixed`, and rows by `names`."""
    count = len(fields(Lanes))

    def function(*flat: Tensor) -> tuple[Tensor, ...]:
        own = dict(zip(_OWN, flat[count:], strict=False))
        fixed = Fixed(**own, rows=dict(zip(names, flat[count + len(_OWN) :], strict=True)))
        lanes, ended = _step(Lanes(*flat[:count]), fixed, density, plan)
        return *_flat(lanes), *_flat(ended)

    return function


def _flat(part: Any) -> list[Tensor]:
    values = [getattr(part, field.name) for field in fields(part)]
    return [value for value in values if isinstance(value, Tensor)]


def arguments(lanes: Lanes, fixed: Fixed) -> list[Tensor]:
    """The arguments of a function from `step_function`."""
    return [*_flat(lanes), *_flat(fixed), *fixed.rows.values()]


def step(function: Callable[..., tuple[Tensor, ...]], lanes: Lanes, fixed: Fixed) -> tuple[Lanes, Ended]:
    """Move every lane by one leapfrog; returns the lanes, and the iterations that have ended."""
    out = function(*arguments(lanes, fixed))
    count = len(fields(Lanes))
    return Lanes(*out[:count]), Ended(*out[count:])


def _step(lanes: Lanes, fixed: Fixed, density: Density, plan: Plan) -> tuple[Lanes, Ended]:
    moving = lanes.phase == MOVING
    random = stream(lanes.key[:, None], 2 * lanes.clock[:, None] + torch.arange(2, device=moving.device))
    level = to_uniform(random)
    lanes, delta = _grow_by_a_leaf(lanes, fixed, density, moving, level[:, 0])
    diverging = delta < -_DIVERGENCE
    turning = _subtrees_turn(lanes, fixed)
    failed = moving & (diverging | turning)
    whole = moving & ~failed & (lanes.leaf + 1 == 1 << lanes.depth)
    lanes = replace(lanes, leaf=lanes.leaf + 1, clock=lanes.clock + 1)
    lanes, turned = _join(lanes, fixed, whole, level[:, 1])
    over = failed | turned | (whole & (lanes.depth == plan.depth))
    ended = Ended(
        over=over,
        iteration=lanes.iteration,
        q=lanes.tree_q,
        log_density=lanes.tree_density,
        energy=lanes.energy,
        acceptance_rate=lanes.acceptance / lanes.leaves.clamp_min(1),
        step_size=lanes.step_size,
        n_steps=lanes.leaves,
        diverging=diverging & over,
    )
    lanes = _end_iteration(lanes, ended, plan)
    lanes, begins = _begin(lanes, fixed, over)
    return _grow(lanes, (whole & ~over) | begins, random[:, 1] % 2 == 0), ended


def _pick(mask: Tensor, new: Tensor, old: Tensor) -> Tensor:
    """`torch.where` with a mask over lanes."""
    return torch.where(mask.reshape(-1, *[1] * (old.dim() - 1)), new, old)


def _grow_by_a_leaf(
    lanes: Lanes, fixed: Fixed, density: Density, moving: Tensor, level: Tensor
) -> tuple[Lanes, Tensor]:
    """Add a leaf to the growing subtree by a leapfrog step; also returns the log weight of the leaf."""

    def slope_at(q: Tensor) -> tuple[Tensor, Tensor]:
        q = q.detach().requires_grad_()
        value = density(q, fixed.powers, fixed.rows)
        (slope,) = torch.autograd.grad(value.sum(), q)
        return value.detach(), slope

    direction = torch.where(lanes.forward, lanes.step_size, -lanes.step_size)
    time = direction.masked_fill(~moving, 0.0)
    q, p, grad, log_density = leapfrog(slope_at, lanes.q, lanes.p, lanes.grad, time, fixed.metric)
    delta = lanes.energy - kinetic(fixed.metric, p) + log_density
    delta = delta.masked_fill(~delta.isfinite(), -torch.inf)
    weight = torch.logaddexp(lanes.sub_weight, delta)
    take = takes_leaf(delta, weight, level)
    grown = replace(
        lanes,
        q=q,
        p=p,
        grad=grad,
        log_density=log_density,
        sub_q=_pick(take, q, lanes.sub_q),
        sub_grad=_pick(take, grad, lanes.sub_grad),
        sub_density=torch.where(take, log_density, lanes.sub_density),
        sub_weight=weight,
        sub_momentum=lanes.sub_momentum + p,
        acceptance=lanes.acceptance + delta.clamp_max(0.0).exp(),
        leaves=lanes.leaves + 1,
    )
    return grown, delta


def _subtrees_turn(lanes: Lanes, fixed: Fixed) -> Tensor:
    """Whether a subtree that ends at the newest leaf turns back, `(lane,)`.

    An even leaf n opens the subtrees whose first leaf it is. An odd leaf n closes subtrees of 2, 4, … leaves, one for
    every 1 at the end of n in binary. Subtrees that are opened together share a place in `checks`, which is the number
    of ones in n / 2 in binary.
    """
    leaf = lanes.leaf
    opens = leaf % 2 == 0
    ones, trailing = _BITS.to(leaf.device)[leaf.clamp_max(len(_BITS) - 1)].unbind(1)
    lane = torch.arange(len(leaf), device=leaf.device)
    place = ones.masked_fill(~opens, MAX_DEPTH)  # the last place is never read
    # With S the sum of momenta, the criterion of a subtree is the sign of p · M⁻¹ (A − C), where A = S − p/2 at the
    # newest leaf and C is the same at the first leaf, so that every check is a dot product with stored vectors.
    centre = lanes.sub_momentum - 0.5 * lanes.p
    along = velocity(fixed.metric, centre)
    own = (lanes.p * along).sum(-1)
    fixed.checks[lane, :, place] = torch.stack([lanes.p, centre], 1)
    fixed.checked[lane, place] = own
    at_first = (fixed.checks[:, 0] @ along[..., None])[..., 0] - fixed.checked
    at_last = own[:, None] - (fixed.checks[:, 1] @ velocity(fixed.metric, lanes.p)[..., None])[..., 0]
    level = torch.arange(MAX_DEPTH + 1, device=leaf.device)
    closing = ~opens[:, None] & (level <= ones[:, None]) & (level > (ones - trailing)[:, None])
    return (closing & ((at_first <= 0) | (at_last <= 0))).any(1)


def _join(lanes: Lanes, fixed: Fixed, whole: Tensor, level: Tensor) -> tuple[Lanes, Tensor]:
    """Join complete subtrees to their trees; returns the lanes, and whether these trees now turn back."""
    weight = torch.where(whole, torch.logaddexp(lanes.tree_weight, lanes.sub_weight), lanes.tree_weight)
    take = whole & takes_leaf(lanes.sub_weight, lanes.tree_weight, level)
    momentum = _pick(whole, lanes.tree_momentum + lanes.sub_momentum, lanes.tree_momentum)
    end = torch.stack([lanes.q, lanes.p, lanes.grad], 1)
    first, last = _pick(whole & ~lanes.forward, end, lanes.first), _pick(whole & lanes.forward, end, lanes.last)
    joined = replace(
        lanes,
        first=first,
        last=last,
        tree_q=_pick(take, lanes.sub_q, lanes.tree_q),
        tree_grad=_pick(take, lanes.sub_grad, lanes.tree_grad),
        tree_density=torch.where(take, lanes.sub_density, lanes.tree_density),
        tree_weight=weight,
        tree_momentum=momentum,
        depth=lanes.depth + whole,
    )
    return joined, whole & turns_back(fixed.metric, first[:, 1], last[:, 1], momentum)


def _end_iteration(lanes: Lanes, ended: Ended, plan: Plan) -> Lanes:
    """Count the iteration, adapt the step size, and set the phase at the end of a window or of the chain."""
    over, at = ended.over, lanes.iteration
    closes = pad(plan.schedule.closes, (0, 1)).to(at.device)[at.clamp_max(plan.warmup)]
    state = (lanes.centre, lanes.error, lanes.average, lanes.count)
    step_size, learnt = adaptation.learn_step(state, ended.acceptance_rate, plan.target_accept)
    learns = over & (at < plan.warmup)
    step_size = torch.where(at == plan.warmup - 1, learnt[2].exp(), step_size)
    centre, error, average, count = (_pick(learns, new, old) for new, old in zip(learnt, state, strict=True))
    phase = lanes.phase.masked_fill(over & closes, WAITING)
    phase = phase.masked_fill(over & (at + 1 == plan.iterations), OVER)
    return replace(
        lanes,
        phase=phase,
        iteration=at + over,
        step_size=_pick(learns, step_size, lanes.step_size),
        centre=centre,
        error=error,
        average=average,
        count=count,
    )


def _begin(lanes: Lanes, fixed: Fixed, over: Tensor) -> tuple[Lanes, Tensor]:
    """Begin an iteration where one is over, or where a fresh point has a finite density; also returns where."""
    finite = lanes.log_density.isfinite() & lanes.grad.isfinite().all(-1)
    fresh = (lanes.phase == FRESH) & finite
    begins = (over & (lanes.phase == MOVING)) | fresh
    tree_q, tree_grad = _pick(fresh, lanes.q, lanes.tree_q), _pick(fresh, lanes.grad, lanes.tree_grad)
    value = torch.where(fresh, lanes.log_density, lanes.tree_density)
    lane = torch.arange(len(begins), device=begins.device)
    p = velocity(fixed.factor, fixed.noise[lane, lanes.iteration % fixed.noise.shape[1]])
    point = torch.stack([tree_q, p, tree_grad], 1)
    begun = replace(
        lanes,
        phase=lanes.phase.masked_fill(fresh, MOVING),
        first=_pick(begins, point, lanes.first),
        last=_pick(begins, point, lanes.last),
        energy=torch.where(begins, kinetic(fixed.metric, p) - value, lanes.energy),
        depth=lanes.depth.masked_fill(begins, 0),
        tree_q=tree_q,
        tree_grad=tree_grad,
        tree_density=value,
        tree_weight=lanes.tree_weight.masked_fill(begins, 0.0),
        tree_momentum=_pick(begins, p, lanes.tree_momentum),
        acceptance=lanes.acceptance.masked_fill(begins, 0.0),
        leaves=lanes.leaves.masked_fill(begins, 0),
    )
    return begun, begins


def _grow(lanes: Lanes, where: Tensor, forward: Tensor) -> Lanes:
    """Start a new subtree at a random end of the trajectory."""
    forward = torch.where(where, forward, lanes.forward)
    q, p, grad = _pick(forward, lanes.last, lanes.first).unbind(1)
    return replace(
        lanes,
        forward=forward,
        q=_pick(where, q, lanes.q),
        p=_pick(where, p, lanes.p),
        grad=_pick(where, grad, lanes.grad),
        leaf=lanes.leaf.masked_fill(where, 0),
        sub_weight=lanes.sub_weight.masked_fill(where, -torch.inf),
        sub_momentum=lanes.sub_momentum.masked_fill(where[:, None], 0.0),
    )

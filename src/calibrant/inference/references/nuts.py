"""The No-U-Turn sampler for many posteriors at once, where each chain builds its own tree.

`lane_state.init` creates the state of all lanes (a lane is one chain of one datum), and `steps` moves every lane by a
few leapfrogs. Lanes are not synchronised: one may be at the first leapfrog of its third iteration while another
completes its hundredth tree, so that no lane waits for the longest tree. A step is a function of tensors without
control flow, so that it can be recorded and compiled. Operations that few lanes need at a time are done by
`lane_state.tend` after every `TENDED` steps, and the random numbers of these steps are drawn together.

The transition is multinomial NUTS with the generalised U-turn criterion (Betancourt 2017, arXiv 1701.02434, appendix
A.4). Trees are built iteratively: at a leaf, each subtree that ends there is checked against the momentum stored at its
first leaf. The sum of momenta in the criterion counts the two ends by half (trapezoidal rule); otherwise, trajectories
on independent Normal targets might turn only after a second lap.

Random numbers are a function of (seed, datum, chain, counter), so that the draws of a lane don't depend on other lanes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from calibrant.inference.references import adaptation
from calibrant.inference.references.adaptation import Schedule
from calibrant.inference.references.powers import Coordinates
from calibrant.inference.references.random_numbers import stream, to_uniform

PLACES = 11  # places for subtrees in `Fixed.checks`; the last one is never read
MAX_DEPTH = PLACES - 1  # doublings of a tree at most
EARLY_DEPTH = 5  # the same before the first metric, under which trees may be far too long
TENDED = 16  # steps between two calls of `lane_state.tend`, which costs as much as ten steps of few lanes
MOVING, FRESH, WAITING, OVER = range(4)  # phases of a lane
_DIVERGENCE = 1000.0  # nats of energy error above which a transition is divergent
STARTS = 100  # starts that are tried per lane
FIRST_STEP = 0.1  # initial step size
MOMENTUM, RESTART = range(2)  # folded into the key of a lane, for random numbers outside its stream
_ONES = [((n >> 1).bit_count(), (n ^ (n + 1)).bit_count() - 1) for n in range(1 << MAX_DEPTH)]  # of n / 2; at the end
_LEAVES = torch.tensor([(ones, ones - end, PLACES - 1 if end else ones) for ones, end in _ONES])
Chance = tuple[Tensor, Tensor, Tensor]  # of one step: uniform numbers for leaf and tree, whether to grow forward
Density = Callable[[Tensor, Tensor, dict[str, Tensor]], Tensor]


@dataclass
class Lanes:
    """The state of all lanes; the first dimension of every tensor is the lane, and `d` is the width of a vector.

    A lane is `MOVING`; or `FRESH`, at a point whose density has to be evaluated; or `WAITING` at the end of a window,
    or of warm-up, for `lane_state.tend`; or `OVER`.
    """

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

    checks: Tensor  # (lane, 2, d, PLACES): momentum, and sum of momenta before it, at first leaves of subtrees
    checked: Tensor  # (lane, PLACES): product of the two under the metric
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
    grad: Tensor
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
    """The settings of all chains; `chains` is the number of lanes of a datum."""

    schedule: Schedule
    iterations: int
    chains: int
    target_accept: float
    coordinates: Coordinates
    choose_powers: bool
    depth: int = MAX_DEPTH
    subchains: int = 1

    @property
    def warmup(self) -> int:
        """Number of warm-up iterations."""
        return len(self.schedule.window)


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


def with_slope(density: Callable[[Tensor], Tensor], q: Tensor) -> tuple[Tensor, Tensor]:
    """A log density of rows `(n, d)`, `(n,)`, and its gradient, `(n, d)`."""
    with torch.enable_grad():
        q = q.detach().requires_grad_()
        value = density(q)
        (slope,) = torch.autograd.grad(value.sum(), q)
    return value.detach(), slope


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
    """The step as a function of the tensors from `arguments`, to be recorded; `names` are those of the rows."""
    moved, own = len(fields(Lanes)), len(_OWN)

    def function(*flat: Tensor) -> tuple[Tensor, ...]:
        level, other, forward, *given = flat[moved:]
        fixed = Fixed(rows=dict(zip(names, given[own:], strict=True)), **dict(zip(_OWN, given, strict=False)))
        lanes, ended = _step(Lanes(*flat[:moved]), fixed, density, plan, (level, other, forward))
        return *_flat(lanes), *_flat(ended)

    return function


def _flat(part: Any) -> list[Tensor]:
    values = [getattr(part, field.name) for field in fields(part)]
    return [value for value in values if isinstance(value, Tensor)]


def arguments(lanes: Lanes, fixed: Fixed, chance: Chance) -> list[Tensor]:
    """The arguments of a function from `step_function`."""
    return [*_flat(lanes), *chance, *_flat(fixed), *fixed.rows.values()]


def chances(key: Tensor, clock: Tensor) -> list[Chance]:
    """The random numbers of the next `TENDED` steps of lanes that have made `clock` steps, `(lane,)` each."""
    random = stream(key, 2 * clock + torch.arange(2 * TENDED, device=key.device)[:, None])
    level, forward = to_uniform(random), random[1::2] % 2 == 0
    return list(zip(level[::2].unbind(), level[1::2].unbind(), forward.unbind(), strict=True))


def steps(
    function: Callable[..., tuple[Tensor, ...]], lanes: Lanes, fixed: Fixed, chances: list[Chance]
) -> tuple[Lanes, list[Ended]]:
    """Move every lane by one leapfrog for each of `chances`; returns the lanes, and what ended in each step."""
    moved, given = len(fields(Lanes)), [*_flat(fixed), *fixed.rows.values()]
    flat, ended = tuple(_flat(lanes)), []
    for chance in chances:
        out = function(*flat, *chance, *given)
        flat = out[:moved]
        ended.append(Ended(*out[moved:]))
    return Lanes(*flat), ended


def _step(lanes: Lanes, fixed: Fixed, density: Density, plan: Plan, chance: Chance) -> tuple[Lanes, Ended]:
    moving, (level, other, forward) = lanes.phase == MOVING, chance
    lanes, delta = _grow_by_a_leaf(lanes, fixed, density, moving, level)
    diverging = delta < -_DIVERGENCE
    failed = moving & (diverging | _subtrees_turn(lanes, fixed))
    leaf = lanes.leaf + 1
    whole = moving & ~failed & (leaf == 1 << lanes.depth)
    lanes, turned = _join(replace(lanes, leaf=leaf), fixed, whole, other)
    early = lanes.iteration < plan.schedule.first
    most = torch.where(early, min(EARLY_DEPTH, plan.depth), plan.depth)
    over = failed | turned | (whole & (lanes.depth >= most))
    ended = Ended(
        over=over,
        iteration=lanes.iteration,
        q=lanes.tree_q,
        grad=lanes.tree_grad,
        log_density=lanes.tree_density,
        energy=lanes.energy,
        acceptance_rate=lanes.acceptance / lanes.leaves.clamp_min(1),
        step_size=lanes.step_size,
        n_steps=lanes.leaves,
        diverging=diverging & over,
    )
    lanes = _end_iteration(lanes, ended, plan)
    lanes, begins = _begin(lanes, fixed, over)
    return _grow(lanes, (whole & ~over) | begins, forward), ended


def _pick(mask: Tensor, new: Tensor, old: Tensor) -> Tensor:
    """`torch.where` with a mask over lanes."""
    return torch.where(mask.reshape(-1, *[1] * (old.dim() - 1)) if old.dim() > 1 else mask, new, old)


def _finite(values: Tensor) -> Tensor:
    """`isfinite`, which is recorded as twice as many operators."""
    return values.abs() < torch.inf


def _grow_by_a_leaf(
    lanes: Lanes, fixed: Fixed, density: Density, moving: Tensor, level: Tensor
) -> tuple[Lanes, Tensor]:
    """Add a leaf to the growing subtree by a leapfrog step; also returns the log weight of the leaf."""

    def slope_at(q: Tensor) -> tuple[Tensor, Tensor]:
        return with_slope(lambda q: density(q, fixed.powers, fixed.rows), q)

    direction = torch.where(lanes.forward, lanes.step_size, -lanes.step_size)
    time = direction.masked_fill(~moving, 0.0)
    q, p, grad, log_density = leapfrog(slope_at, lanes.q, lanes.p, lanes.grad, time, fixed.metric)
    delta = lanes.energy - kinetic(fixed.metric, p) + log_density
    delta = delta.masked_fill(~_finite(delta), -torch.inf)
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
    highest, lowest, place = _LEAVES.to(leaf.device)[leaf.clamp_max(len(_LEAVES) - 1)].unbind(1)
    lane = torch.arange(len(leaf), device=leaf.device)
    # With S the sum of momenta, the criterion of a subtree is the sign of p · M⁻¹ (A − C), where A = S − p/2 at the
    # newest leaf and C is the same at the first leaf, so that every check is a dot product with stored vectors.
    centre = lanes.sub_momentum - 0.5 * lanes.p
    along = velocity(fixed.metric, centre)
    own = (lanes.p * along).sum(-1)
    fixed.checks[lane, :, :, place] = torch.stack([lanes.p, centre], 1)
    fixed.checked[lane, place] = own
    # Places are the last dimension, so that the products of all places are computed by the same vector instructions.
    by_entry = torch.stack([along, -velocity(fixed.metric, lanes.p)], 1)
    products = torch.bmm(by_entry.flatten(0, 1)[:, None], fixed.checks.flatten(0, 1)).reshape(len(leaf), 2, PLACES)
    turning = (products[:, 0] <= fixed.checked) | (products[:, 1] <= -own[:, None])
    number = torch.arange(PLACES, device=leaf.device)
    closing = (number <= highest[:, None]) & (number > lowest[:, None])  # none at a leaf that opens subtrees
    return (closing & turning).any(1)


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
    """Count the iteration, adapt the step size, and set the phase at the end of a window, warm-up, or the chain."""
    over, at = ended.over, lanes.iteration
    closes = pad(plan.schedule.closes, (0, 1)).to(at.device)[at.clamp_max(plan.warmup)] | (at == plan.warmup - 1)
    state = (lanes.centre, lanes.error, lanes.average, lanes.count)
    step_size, learnt = adaptation.learn_step(state, ended.acceptance_rate, plan.target_accept)
    learns = over & (at < plan.warmup)
    error, average, count = (_pick(learns, new, old) for new, old in zip(learnt[1:], state[1:], strict=True))
    phase = lanes.phase.masked_fill(over & closes, WAITING)
    phase = phase.masked_fill(over & (at + 1 == plan.iterations), OVER)
    return replace(
        lanes,
        phase=phase,
        iteration=at + over,
        step_size=_pick(learns, step_size, lanes.step_size),
        error=error,
        average=average,
        count=count,
    )


def _begin(lanes: Lanes, fixed: Fixed, over: Tensor) -> tuple[Lanes, Tensor]:
    """Begin an iteration where one is over, or where a fresh point has a finite density; also returns where."""
    finite = _finite(lanes.log_density) & _finite(lanes.grad).all(-1)
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

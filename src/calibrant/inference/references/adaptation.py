"""Adaptation in warm-up: the step size of each chain, and the metric and coordinates of each datum.

Step sizes follow dual averaging (Hoffman & Gelman 2014, JMLR 15) lane by lane, and at the end of warm-up a lane takes
their mean over the chains of its datum, so that none has to wait for one with far smaller steps. Metrics are estimated
in windows of growing length. When a chain reaches the end of a window, it uses the draws that all chains of its datum
have contributed to the window by then, so that no chain waits for another. Coordinates are chosen together with the
metric, by how well a diagonal Normal fits the draws.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

_GAMMA, _DELAY, _DECAY = 0.05, 10.0, 0.75  # parameters of dual averaging, as in Hoffman & Gelman
_UNUSED = 5  # first iterations, whose draws are in no window
_FIRST_DRAWS, _SHORTEST, _LONGEST = 128, 8, 25  # of the first window: draws of all chains; iterations
_LAST, _LAST_SHARE = 50, 0.15  # iterations after the last window, in which only step sizes adapt; share of short ones
_SETTLED = 60  # iterations after which chains no longer travel from their starts
_ENOUGH = 16  # draws of a window that are needed to choose coordinates or to move chains
_SLACK, _SLACK_EACH = 20.0, 10.0  # nats, and nats per dimension, by which the density of a chain may be lower


@dataclass(frozen=True)
class Schedule:
    """The windows of warm-up.

    Attributes:
        window: window of every iteration, −1 for none.
        closes: whether an iteration closes its window.
        settled: whether a window begins so late, or is the last, that chains have arrived where they stay.
        first: number of iterations before the first metric.
        last: number of iterations before the last metric; those that follow only adapt step sizes.
    """

    window: Tensor
    closes: Tensor
    settled: Tensor
    first: int
    last: int

    @property
    def windows(self) -> int:
        """Number of windows."""
        return len(self.settled)


def schedule(warmup: int, chains: int) -> Schedule:
    """Windows for a warm-up of this length, each longer than the one before.

    The first has 128 draws of all chains of a datum, in 8 to 25 iterations, since draws with gradients tell a metric
    long before the chains have arrived. Windows double or, where 16 chains or more fill them, first grow by half. The
    last window takes the rest; of many chains it is short, so that it holds no draws of chains that still travel.
    """
    stop = warmup - min(_LAST, round(_LAST_SHARE * warmup))
    start, index = min(_UNUSED, warmup // 5), 0
    length = min(_LONGEST, max(_SHORTEST, -(-_FIRST_DRAWS // chains)))
    many = length == _SHORTEST
    window, closes, settled = torch.full((warmup,), -1), torch.zeros(warmup, dtype=torch.bool), []
    while start < stop:
        slowly = many and start < _SETTLED
        end, following = start + length, length * 3 // 2 if slowly else 2 * length
        if end + (length if many else following) > stop:  # the next window would not fit: this one takes the rest
            end = stop
        window[start:end], closes[end - 1] = index, True
        settled.append(start >= _SETTLED or end == stop)
        start, length, index = end, following, index + 1
    first = int((window <= 0).sum() - (window[stop:] < 0).sum())
    return Schedule(window, closes, torch.tensor(settled, dtype=torch.bool), first, stop)


@dataclass
class Adaptation:
    """Statistics of the draws, and of the gradients at the draws, in warm-up.

    There are `k` candidate coordinates, `w` windows and vectors of width `d`.
    """

    draws: Tensor  # (lane, w): number of draws
    mean: Tensor  # (lane, w, 2, k, d): means of the draws and gradients
    scatter: Tensor  # (lane, w, 2, k, d), or (lane, w, 2, k, d, d) for a dense metric: sums of squares about the means
    slopes: Tensor  # (lane, w, pair, k): sums of log|dv/dz|
    density: Tensor  # (lane, w): sums of the log density


def start(q: Tensor, windows: int, candidates: int, pairs: int, dense: bool) -> Adaptation:
    """Statistics without any draws, for lanes with vectors like `q` `(lane, d)`."""
    lanes, width = q.shape
    windows = max(windows, 1)
    return Adaptation(
        draws=q.new_zeros(lanes, windows),
        mean=q.new_zeros(lanes, windows, 2, candidates, width),
        scatter=q.new_zeros(lanes, windows, 2, candidates, *((width, width) if dense else (width,))),
        slopes=q.new_zeros(lanes, windows, pairs, candidates),
        density=q.new_zeros(lanes, windows),
    )


Averaging = tuple[Tensor, Tensor, Tensor, Tensor]


def learn_step(state: Averaging, acceptance: Tensor, wanted: float) -> tuple[Tensor, Averaging]:
    """Update the step size by dual averaging after an iteration; all tensors are `(lane,)`.

    Args:
        state: the log step size towards which to shrink, the mean error, the averaged log step size, the number of
            iterations.
        acceptance: mean acceptance probability of the iteration.
        wanted: target for the mean acceptance probability.

    Returns:
        The next step size and state.
    """
    centre, error, average, count = state
    count = count + 1
    weight = 1 / (count + _DELAY)
    error = (1 - weight) * error + weight * (wanted - acceptance)
    log_step = centre - count.sqrt() / _GAMMA * error
    forget = count**-_DECAY
    return log_step.exp(), (centre, error, forget * log_step + (1 - forget) * average, count)


def contribute(
    state: Adaptation, lane: Tensor, window: Tensor, vectors: Tensor, slopes: Tensor, density: Tensor
) -> None:
    """Add draws of lanes to their windows, in place; those of one lane are in one window.

    The draws of a lane are summed up in their order, then joined with what is there (Chan, Golub & LeVeque 1983), so
    that a lane's statistics do not depend on other lanes.

    Args:
        state: statistics so far.
        lane: `(n,)`.
        window: `(n,)`.
        vectors: the draws and their gradients in all candidate coordinates, `(n, 2, k, d)`.
        slopes: log|dv/dz| at the draws, `(n, pair, k)`.
        density: log density at the draws, `(n,)`.
    """
    lanes = torch.arange(len(state.draws), device=lane.device)
    at = lanes, torch.zeros_like(lanes).index_put((lane,), window)

    def summed(values: Tensor) -> Tensor:
        total = values.new_zeros(len(lanes), *values.shape[1:])
        return total.index_put_((lane,), values, accumulate=True)  # unlike `index_add_`, in the same order on a GPU

    def product(values: Tensor) -> Tensor:
        return values[..., :, None] * values[..., None, :] if dense else values.square()

    dense = state.scatter.dim() == 6
    added, before = summed(torch.ones_like(density)), state.draws[at]
    share = added / (before + added).clamp_min(1)
    centre = summed(vectors) / added.clamp_min(1)[:, None, None, None]
    moved = centre - state.mean[at]
    between = product(moved) * (before * share).reshape(-1, *[1] * (state.scatter.dim() - 2))
    within = summed(product(vectors - centre[lane]))
    parts = (state.draws, added), (state.mean, share[:, None, None, None] * moved), (state.scatter, within + between)
    for part, more in (*parts, (state.slopes, summed(slopes)), (state.density, summed(density))):
        part[at] += more


def stray(state: Adaptation, lane: Tensor, chains: Tensor, window: Tensor) -> tuple[Tensor, Tensor]:
    """Find chains in places with next to no posterior mass, and another chain of the same datum for each.

    A chain is astray if its mean log density in the window is more than 20 + 10 d nats below the median of the other
    chains of its datum. To have the same mass, its place would have to be wider by a factor of 20,000 in all d
    dimensions. The comparison is with the median, not the maximum, so that chains are not moved to a narrow spike.

    Args:
        state: statistics of the draws in warm-up.
        lane: lanes to be checked, `(n,)`.
        chains: all lanes of the datum of each lane, `(n, c)`.
        window: window of each lane, `(n,)`.

    Returns:
        Whether a lane is astray, `(n,)`, and the lane with the median density among the other chains, `(n,)`.
    """
    at = chains, window[:, None].expand_as(chains)
    mean = (state.density[at] / state.draws[at]).masked_fill(state.draws[at] < _ENOUGH, torch.nan)
    own = mean.gather(1, (chains == lane[:, None]).long().argmax(1, keepdim=True))[:, 0]
    others = mean.masked_fill(chains == lane[:, None], torch.nan)
    middle = others.nanmedian(1)
    known = (~others.isnan()).sum(1) >= 2
    return known & (own < middle.values - _slack(state)), chains.gather(1, middle.indices[:, None])[:, 0]


def _slack(state: Adaptation) -> float:
    return _SLACK + _SLACK_EACH * state.mean.shape[-1]


def forget(state: Adaptation, lane: Tensor, window: Tensor) -> None:
    """Delete the contributions of lanes to a window."""
    for part in (state.draws, state.mean, state.scatter, state.slopes, state.density):
        part[lane, window] = 0.0


def pooled(state: Adaptation, chains: Tensor, window: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Combine the statistics of the chains of a datum in a window.

    Chains far below the median density, as in `stray`, are left out: they are astray, or still travel.

    Args:
        state: statistics of the draws in warm-up.
        chains: the lanes of each datum, `(n, c)`.
        window: `(n,)`.

    Returns:
        Numbers of draws `(n,)`; variances of draws and gradients `(n, 2, k, d)` or, for a dense metric, covariances
        `(n, 2, k, d, d)`; and mean log|dv/dz| `(n, pair, k)`.
    """
    at = chains, window[:, None].expand_as(chains)
    density = state.density[at] / state.draws[at]
    used = ~(density < density.nanmedian(1, keepdim=True).values - _slack(state))
    count, mean, scatter, slopes = (
        part[at].masked_fill(~used.reshape(*used.shape, *[1] * (part.dim() - 2)), 0.0)
        for part in (state.draws, state.mean, state.scatter, state.slopes)
    )
    total = count.sum(1).clamp_min(1)
    weight = count[..., None, None, None]
    centre = (weight * mean).sum(1) / total[:, None, None, None]
    apart = mean - centre[:, None]
    if scatter.dim() == 6:
        between = (weight[..., None] * apart[..., :, None] * apart[..., None, :]).sum(1)
    else:
        between = (weight * apart.square()).sum(1)
    scatter = scatter.sum(1) + between
    variance = scatter / (total - 1).clamp_min(1).reshape(-1, *[1] * (scatter.dim() - 1))
    return total, variance, slopes.sum(1) / total[:, None, None]


def choose(count: Tensor, variance: Tensor, slopes: Tensor, table: Tensor, pair_of: Tensor, powers: Tensor) -> Tensor:
    """The candidate coordinates in which a diagonal Normal fits the draws best, for every pair, `(n, pair)`.

    Up to terms that are the same in all coordinates, the Kullback–Leibler divergence from the posterior to the best
    diagonal Normal is ½ Σ log var(v) − E log|dv/dz|.

    Args:
        count: number of draws, `(n,)`.
        variance: variances of the entries in all candidate coordinates, `(n, k, d)`.
        slopes: mean log|dv/dz|, `(n, pair, k)`.
        table: κ by pair and candidate, `(pair, k)`.
        pair_of: pair of every entry, −1 for none, `(d,)`.
        powers: current κ, `(n, pair)`, which is kept where draws are few.
    """
    scores = []
    for pair in range(len(table)):
        entries = pair_of == pair
        spread = 0.5 * variance[:, :, entries].clamp_min(1e-300).log().sum(-1)
        scores.append(spread - slopes[:, pair])
    best = torch.stack(scores, 1).argmin(-1)
    now = (table == powers[..., None]).long().argmax(-1)
    return torch.where((count >= _ENOUGH)[:, None], best, now)

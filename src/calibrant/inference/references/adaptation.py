"""Adaptation in warm-up: the step size of each chain, and the metric and coordinates of each datum.

Step sizes follow dual averaging (Hoffman & Gelman 2014, JMLR 15) lane by lane. Metrics are estimated in Stan's windows
of growing length. When a chain reaches the end of a window, it uses the draws that all chains of its datum have
contributed to the window by then, so that no chain waits for another. Coordinates are chosen together with the metric,
by how well a diagonal Normal fits the draws.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

_GAMMA, _DELAY, _DECAY = 0.05, 10.0, 0.75  # parameters of dual averaging, as in Hoffman & Gelman
STAN = 75, 50, 25  # Stan's buffers before and after the windows, and first window, in iterations
_PRIOR_DRAWS, _PRIOR_VARIANCE = 5.0, 1e-3  # Stan's shrinkage of the metric
_ENOUGH = 20  # draws of a window that are needed to choose coordinates or to move chains
_SLACK, _SLACK_EACH = 20.0, 10.0  # nats, and nats per dimension, by which the density of a chain may be lower


@dataclass(frozen=True)
class Schedule:
    """The window of every iteration of warm-up (−1 for none), and whether the iteration closes the window."""

    window: Tensor
    closes: Tensor

    @property
    def windows(self) -> int:
        """Number of windows."""
        return int(self.closes.sum())


def schedule(warmup: int, lengths: tuple[int, int, int] = STAN) -> Schedule:
    """Stan's windows for a warm-up of this length, from the lengths of the two buffers and of the first window."""
    first, last, base = lengths
    if warmup < first + last + base:
        first, last = int(0.15 * warmup), int(0.1 * warmup)
        base = warmup - first - last
    window, closes = torch.full((warmup,), -1), torch.zeros(warmup, dtype=torch.bool)
    start, length, index = first, base, 0
    while start < warmup - last:
        end = start + length
        if end + 2 * length > warmup - last:  # the next window would not fit: this one takes the rest
            end = warmup - last
        window[start:end], closes[end - 1] = index, True
        start, length, index = end, 2 * length, index + 1
    return Schedule(window, closes)


@dataclass
class Adaptation:
    """Statistics of the draws in warm-up, for `k` candidate coordinates, `w` windows and vectors of width `d`."""

    draws: Tensor  # (lane, w): number of draws
    mean: Tensor  # (lane, w, k, d): mean of the draws
    scatter: Tensor  # (lane, w, k, d), or (lane, w, k, d, d) for a dense metric: sums of squares about the mean
    slopes: Tensor  # (lane, w, pair, k): sums of log|dv/dz|
    density: Tensor  # (lane, w): sums of the log density


def start(q: Tensor, windows: int, candidates: int, pairs: int, dense: bool) -> Adaptation:
    """Statistics without any draws, for lanes with vectors like `q` `(lane, d)`."""
    lanes, width = q.shape
    windows = max(windows, 1)
    return Adaptation(
        draws=q.new_zeros(lanes, windows),
        mean=q.new_zeros(lanes, windows, candidates, width),
        scatter=q.new_zeros(lanes, windows, candidates, *((width, width) if dense else (width,))),
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


def contribute(state: Adaptation, lane: Tensor, window: Tensor, draws: Tensor, slopes: Tensor, density: Tensor) -> None:
    """Add one draw of each lane to its window (Welford's update), in place.

    Args:
        state: statistics so far.
        lane: `(n,)`.
        window: `(n,)`.
        draws: the draws in all candidate coordinates, `(n, k, d)`.
        slopes: log|dv/dz| at the draws, `(n, pair, k)`.
        density: log density at the draws, `(n,)`.
    """
    count = state.draws[lane, window] + 1
    mean = state.mean[lane, window]
    before = draws - mean
    mean = mean + before / count[:, None, None]
    after = draws - mean
    dense = state.scatter.dim() == 5
    product = before[..., :, None] * after[..., None, :] if dense else before * after
    state.scatter[lane, window] += product
    state.mean[lane, window] = mean
    state.draws[lane, window] = count
    state.slopes[lane, window] += slopes
    state.density[lane, window] += density


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
    slack = _SLACK + _SLACK_EACH * state.mean.shape[-1]
    return known & (own < middle.values - slack), chains.gather(1, middle.indices[:, None])[:, 0]


def forget(state: Adaptation, lane: Tensor, window: Tensor) -> None:
    """Delete the contributions of lanes to a window."""
    for part in (state.draws, state.mean, state.scatter, state.slopes, state.density):
        part[lane, window] = 0.0


def pooled(state: Adaptation, chains: Tensor, window: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Combine the statistics of all chains of a datum in a window.

    Args:
        state: statistics of the draws in warm-up.
        chains: the lanes of each datum, `(n, c)`.
        window: `(n,)`.

    Returns:
        Numbers of draws `(n,)`, variances `(n, k, d)` or, for a dense metric, covariances `(n, k, d, d)`, and mean
        log|dv/dz| `(n, pair, k)`.
    """
    at = chains, window[:, None].expand_as(chains)
    count, mean = state.draws[at], state.mean[at]
    total = count.sum(1).clamp_min(1)
    share = (count / total[:, None])[..., None, None]
    centre = (share * mean).sum(1)
    apart = mean - centre[:, None]
    weight = count[..., None, None]
    if state.scatter.dim() == 5:
        between = (weight[..., None] * apart[..., :, None] * apart[..., None, :]).sum(1)
    else:
        between = (weight * apart.square()).sum(1)
    scatter = state.scatter[at].sum(1) + between
    variance = scatter / (total - 1).clamp_min(1).reshape(-1, *[1] * (scatter.dim() - 1))
    return total, variance, state.slopes[at].sum(1) / total[:, None, None]


def metric(count: Tensor, variance: Tensor) -> Tensor:
    """Stan's estimate of the inverse mass, from variances `(n, d)` or covariances `(n, d, d)` of `count` draws."""
    share = (count / (count + _PRIOR_DRAWS)).reshape(-1, *[1] * (variance.dim() - 1))
    floor = _PRIOR_VARIANCE * (1 - share)
    if variance.dim() == 3:
        return share * variance + floor * torch.eye(variance.shape[-1], dtype=variance.dtype, device=variance.device)
    return share * variance + floor


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

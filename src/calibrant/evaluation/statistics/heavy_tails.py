"""Latents whose tails are too heavy for means and sds, and the statistics of quantiles that judge them instead.

The Monte Carlo error of an sd depends on the fourth moment. Where a posterior has none (Student t with 4 degrees of
freedom or fewer) or where it is decided by draws that hardly ever occur (a LogNormal with σ = 0.7 or more), neither the
estimate nor its standard error can be trusted. The tail index k of (x − median)² tells: above 1/2, the fourth moment is
infinite or out of reach (Vehtari, Simpson, Gelman, Yao & Gabry 2024, JMLR 25(72), for the estimate of k).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from arviz_stats.base import array_stats

from calibrant.evaluation.statistics.draws import TINY, Draws

Array = npt.NDArray[np.float64]

HEAVY = 0.5  # tail index of the squared draws from which a variance of the sd does not exist
WIDTHS = (50, 80)  # central masses, in percent, whose widths are compared
_QUARTER = 16.0  # relative efficiency for which ArviZ fits a tail of a quarter as many draws
_LONG = 0.3  # index from which statistics of several latents take a bounded transform
_CLEARLY, _SOME = 0.7, 0.15  # an index that is heavy beyond noise, and the share of the data that have it
_BOUNDED = -10.0  # index of a tail that ends at a bound
_SAME = 1e-9  # relative difference below which all draws of a tail are the same: they lie at a bound
_NORMAL_IQR = 1.3489795  # interquartile range of a Normal distribution in sds
_STEP = 0.25  # half width of the difference that estimates a density at a quantile, as a share of the smaller tail


@dataclass(frozen=True)
class Tails:
    """How each latent is judged; the rule is one for all data.

    Attributes:
        index: `(latent,)`, the tail index of the reference's squared draws, the median over data.
        heavy: `(latent,)`, whether quantiles decide in place of mean and sd.
        log_scale: `(latent,)`, whether a heavy-tailed latent is positive and therefore judged on the log scale.
    """

    index: Array
    heavy: npt.NDArray[np.bool_]
    log_scale: npt.NDArray[np.bool_]

    @property
    def stretched(self) -> npt.NDArray[np.bool_]:
        """`(latent,)`, whether statistics of several latents and of single data take a bounded transform.

        They do from a smaller index on, because few draws of heavy tails make the errors of single data large.
        """
        return self.heavy | (self.index > _LONG)

    def on_scale(self, draws: Draws) -> Draws:
        """The draws with positive heavy-tailed latents on the log scale."""
        if not self.log_scale.any():
            return draws
        values = draws.values.copy()
        smallest = np.finfo(np.float64).tiny
        values[..., self.log_scale] = np.log(np.maximum(values[..., self.log_scale], smallest))
        return Draws(values, draws.independent)

    def bounded(self, draws: Draws, centre: Array, scale: Array) -> Draws:
        """The draws of `on_scale` in units of `scale` around `centre`; heavy tails are mapped by asinh.

        The map makes all moments exist, so that heavy-tailed latents can take part in correlations and directions.
        """
        values = self.on_scale(draws).mapped(centre, scale).values
        values[..., self.stretched] = np.arcsinh(values[..., self.stretched])
        return Draws(values, draws.independent)


def tails_of(references: Iterable[Draws], positive: npt.NDArray[np.bool_]) -> Tails:
    """How to judge the latents.

    The reference decides, since a guide whose own tails are too heavy must not be asked less. A latent has heavy tails
    if its index exceeds 1/2 in the median over data, or clearly (0.7) for 15% of them.

    Args:
        references: draws of the reference for some of the data.
        positive: `(latent,)`, whether all draws of both sides are positive.
    """
    found = [_tail_index(draws) for draws in references]
    if not found:
        return Tails(np.full(len(positive), np.nan), np.zeros_like(positive), np.zeros_like(positive))
    indices = np.stack(found)
    index = np.median(indices, axis=0)
    heavy = (index > HEAVY) | ((indices > _CLEARLY).mean(0) > _SOME)
    return Tails(index, heavy, positive & heavy)


def positive_in(a: Draws, r: Draws) -> npt.NDArray[np.bool_]:
    """Which latents are positive in all draws of both sides, `(latent,)`."""
    return np.asarray(np.minimum(a.values.min((0, 1)), r.values.min((0, 1))) > 0.0)


def _tail_index(draws: Draws) -> Array:
    """Tail index k of the squared distances from the median, `(latent,)`; −10 for constant latents.

    It is the smaller one of two tails, one with a quarter of the draws of the other: a heavy tail stays heavy, while a
    small mode far away looks heavy only to the tail that it does not fill.
    """
    square = (draws.rows - draws.quantiles([0.5]).T) ** 2
    few = max(1, int(3.0 * np.sqrt(draws.count / _QUARTER)))  # draws of the smaller tail
    largest = np.partition(square, -few, axis=1)[:, -few:]
    varies = largest.min(1) < (1.0 - _SAME) * largest.max(1)
    found = np.full(len(square), _BOUNDED)
    if varies.any():
        scaled = square[varies] / square[varies].max(1, keepdims=True)
        with np.errstate(all="ignore"):
            tails = [array_stats.pareto_khat(scaled[:, None], r_eff=r, tail="right") for r in (1.0, _QUARTER)]
            found[varies] = np.min(tails, axis=0)
    return np.nan_to_num(found, nan=_BOUNDED, posinf=-_BOUNDED).clip(_BOUNDED, -_BOUNDED)


def robust_scale(draws: Draws) -> tuple[Array, Array]:
    """Median, and interquartile range in units of that of a Normal distribution with sd 1, `(latent,)` each."""
    low, middle, high = draws.quantiles([0.25, 0.5, 0.75])
    return middle, np.maximum(high - low, TINY) / _NORMAL_IQR


def quantile_statistics(a: Draws, r: Draws) -> dict[str, Array]:
    """Error of the median in reference IQR / 1.349, and ratios of central widths, `(latent,)` each with `…_se`.

    Both sides are on the scale on which they are judged. A quantile's influence is (p − 1[x ≤ q]) / f(q); the density f
    is the difference quotient of quantiles.
    """
    sides = _in_robust_units(a, r)
    found = {"median_error": sides[0].at(0.5), "median_error_se": _error(sides, [s.influence(0.5) for s in sides])}
    for mass in WIDTHS:
        ratio = sides[0].width(mass) / sides[1].width(mass)
        found[f"width_{mass}_ratio"] = ratio
        found[f"width_{mass}_ratio_se"] = ratio * _error(sides, [s.width_influence(mass) for s in sides])
    return found


def quantile_blocks(a: Draws, r: Draws) -> list[Array]:
    """Block means `(latent, block)` of the influence of draws on the error of the median and on each log width."""
    ours, theirs = _in_robust_units(a, r)
    found = [ours.draws.blocks(ours.influence(0.5)) - theirs.draws.blocks(theirs.influence(0.5))]
    for mass in WIDTHS:
        blocks = [side.draws.blocks(side.width_influence(mass)) for side in (ours, theirs)]
        found.append(blocks[0] - blocks[1])
    return found


def _in_robust_units(a: Draws, r: Draws) -> list[_Quantiles]:
    centre, scale = robust_scale(r)
    return [_Quantiles(side.mapped(centre, scale)) for side in (a, r)]


@dataclass(frozen=True)
class _Quantiles:
    draws: Draws

    def at(self, probability: float) -> Array:
        return self.draws.quantiles([probability])[0]

    def width(self, mass: int) -> Array:
        """Width of the central mass, in percent."""
        tail = (1.0 - mass / 100.0) / 2.0
        return np.maximum(self.at(1.0 - tail) - self.at(tail), TINY)

    def width_influence(self, mass: int) -> Array:
        """First-order effect of each draw on the log of that width, `(latent, chain · draw)`."""
        tail = (1.0 - mass / 100.0) / 2.0
        return (self.influence(1.0 - tail) - self.influence(tail)) / self.width(mass)[:, None]

    def influence(self, probability: float) -> Array:
        """First-order effect of each draw on a quantile, `(latent, chain · draw)`."""
        step = min(0.05, _STEP * min(probability, 1.0 - probability))
        low, high = self.draws.quantiles([probability - step, probability + step])
        slope = (high - low) / (2.0 * step)
        return slope[:, None] * (probability - (self.draws.rows <= self.at(probability)[:, None]))


def _error(sides: list[_Quantiles], series: list[Array]) -> Array:
    """Standard error from an influence series of each side."""
    return np.asarray(np.sqrt(sum(s.draws.variance(x) for s, x in zip(sides, series, strict=True))))

"""Quadratics through curves over the unit interval, with the errors that Monte Carlo errors of the curves bring."""

from __future__ import annotations

from statistics import NormalDist
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from calibrant.inference.scoring import Array

THRESHOLDS = tuple(np.linspace(0.0, 0.5, 11).round(3).tolist())

_ROUNDING = 1e-9
_LEAST = 4  # points of a fit: one more than it has coefficients
_FALSE_ALARM = 0.025  # share of straight curves that are called concave


class Quadratics(NamedTuple):
    """Least-squares fits c₀ + c₁ λ + c₂ λ² of curves, NaN with fewer than four points; every field is `(curve,)`.

    `bulge`, −c₂/4, is the height of the fit's middle above the straight line between its ends; `vertex` is the place
    of its extremum. `…_se` are standard errors.
    """

    bulge: Array
    bulge_se: Array
    vertex: Array
    vertex_se: Array

    @property
    def concave(self) -> npt.NDArray[np.bool_]:
        """Whether the bulge is positive beyond its error; a straight curve is called concave in 2.5% of cases."""
        return np.nan_to_num(self.bulge) > NormalDist().inv_cdf(1 - _FALSE_ALARM) * np.nan_to_num(self.bulge_se)

    @property
    def known(self) -> npt.NDArray[np.bool_]:
        """Which curves have a fit."""
        return np.asarray(np.isfinite(self.bulge))

    def counted(self, beyond_error: bool = True) -> npt.NDArray[np.bool_]:
        """Which curves are concave with a vertex in ½ ± each threshold, `(curve, threshold)`; False without a fit.

        Args:
            beyond_error: whether a bulge within its error is not counted; else its sign alone counts.
        """
        is_concave = self.concave if beyond_error else np.nan_to_num(self.bulge) > 0
        near = np.abs(np.nan_to_num(self.vertex, nan=np.inf) - 0.5)[:, None] <= np.array(THRESHOLDS) + _ROUNDING
        return np.asarray(is_concave[:, None] & near)

    def shares(self, beyond_error: bool = True) -> Array:
        """Share of the curves with a fit that are counted, `(threshold,)`; NaN if there are none."""
        counted = self.counted(beyond_error)[self.known]
        return counted.mean(0) if len(counted) else np.full(len(THRESHOLDS), np.nan)

    def bounds(self) -> tuple[Array, Array]:
        """The share of all curves, with those without a fit counted as not concave, and as concave, `(threshold,)`."""
        counted = self.counted()
        return counted.mean(0), (counted | ~self.known[:, None]).mean(0)


def quadratics(steps: Array, repeats: Array, variances: Array) -> Quadratics:
    """Fit a quadratic to each curve's mean over repeats.

    With several repeats, the errors are no smaller than those that the spread of the repeats gives, pooled over curves:
    it has parts that all points of a repeat share.

    Args:
        steps: places λ, `(step,)`.
        repeats: the curves, `(repeat, curve, step)`; points that are NaN in any repeat are left out.
        variances: Monte Carlo variances of the points, in the same shape, independent of one another.
    """
    count = len(repeats)
    there: npt.NDArray[np.bool_] = np.asarray(np.isfinite(repeats).all(0))
    maps = [_map(steps, points) for points in there]
    each = np.stack(
        [[_at(to, curve) for to, curve in zip(maps, repeat, strict=True)] for repeat in repeats]
    )  # (repeat, curve, coefficient)
    mean, variance = each.mean(0), variances.mean(0) / count
    covariance = np.stack([(to * np.nan_to_num(row)) @ to.T for to, row in zip(maps, variance, strict=True)])
    if count > 1:
        off = (each - mean)[:, np.isfinite(mean).all(1)]
        pooled = np.einsum("rci,rcj->ij", off, off) / (count - 1) / max(1, off.shape[1]) / count
        covariance = np.where((covariance[:, 2, 2] < pooled[2, 2])[:, None, None], pooled, covariance)
    _, first, second = mean.T
    with np.errstate(divide="ignore", invalid="ignore"):
        vertex = -first / (2 * second)
        slope = np.stack([-1 / (2 * second), first / (2 * second**2)], -1)  # of the vertex in c₁ and c₂
        vertex_se = np.sqrt(np.einsum("ci,cij,cj->c", slope, covariance[:, 1:, 1:], slope))
    return Quadratics(-second / 4, np.sqrt(covariance[:, 2, 2]) / 4, vertex, vertex_se)


def _map(steps: Array, points: npt.NDArray[np.bool_]) -> Array:
    """The matrix that maps a curve to its coefficients, `(3, step)`, zero at points that are left out."""
    found = np.zeros((3, len(steps)))
    if points.sum() < _LEAST:
        return np.full_like(found, np.nan)
    found[:, points] = np.linalg.pinv(np.vander(steps[points], 3, increasing=True))
    return found


def _at(to: Array, curve: Array) -> Array:
    found: Array = to @ np.nan_to_num(curve)
    return found

"""Logistic recalibration of probabilities: y ~ Bernoulli(σ(intercept + slope · logit p)), for resampled data."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
from scipy.special import expit

from calibrant.evaluation.statistics.arrays import Array
from calibrant.evaluation.statistics.resampling import Statistic

_STEPS, _AGAIN = 50, 4  # Newton steps for all data, and from there for a resample
_FAR = 100.0  # a slope or intercept beyond it means that no finite one is best
_CLOSE = 1e-6  # of the gradient, per datum, for a solution


def counted_recalibration(logits: npt.ArrayLike, outcomes: npt.ArrayLike) -> Statistic:
    """Intercept and slope, `(resample, 2)`, by maximum likelihood; NaN where the outcomes are separated perfectly.

    Args:
        logits: log odds of the predicted probabilities, finite, `(datum,)`.
        outcomes: 0 or 1, `(datum,)`.
    """
    x, y = np.asarray(logits, np.float64), np.asarray(outcomes, np.float64)
    centre, scale = x.mean(), max(float(x.std()), 1e-12)
    design = np.stack([np.ones_like(x), (x - centre) / scale], 1)
    start = _newton(design, y, np.ones((1, len(x))), np.zeros((1, 2)), _STEPS)

    def recalibration(counts: Array) -> Array:
        first = np.broadcast_to(np.nan_to_num(start), (len(counts), 2))
        found = _newton(design, y, counts, first, _AGAIN if np.isfinite(start).all() else _STEPS)
        slope = found[:, 1] / scale
        both = np.stack([found[:, 0] - slope * centre, slope], 1)
        return np.where(_overlap(x, y, counts)[:, None], both, np.nan)

    return recalibration


def _overlap(x: Array, y: Array, counts: Array) -> npt.NDArray[np.bool_]:
    """Whether the logits of both outcomes overlap in every row of counts, so that a finite slope is best."""
    ends = {}
    for outcome in (0, 1):
        there = (counts > 0) & (y == outcome)
        ends[outcome] = (np.where(there, x, np.inf).min(1), np.where(there, x, -np.inf).max(1))
    return (ends[0][0] < ends[1][1]) & (ends[1][0] < ends[0][1])


def _newton(design: Array, y: Array, counts: Array, start: Array, steps: int) -> Array:
    """Maximum of the log likelihood of every row of counts, by damped Newton steps; NaN where there is none."""
    found = np.array(start)
    products = (design[:, :, None] * design[:, None]).reshape(-1, 4)
    for _ in range(steps):
        p = expit(found @ design.T)
        gradient = (counts * (y - p)) @ design
        curvature = ((counts * p * (1 - p)) @ products).reshape(-1, 2, 2)
        curvature += 1e-12 * counts.sum(1)[:, None, None] * np.eye(2)
        step = np.linalg.solve(curvature, gradient[..., None])[..., 0]
        found += step * np.minimum(1.0, 4.0 / np.maximum(np.abs(step).max(1, keepdims=True), 1e-300))
    gradient = (counts * (y - expit(found @ design.T))) @ design
    solved = np.abs(gradient).max(1) < _CLOSE * counts.sum(1)
    inside = np.abs(found).max(1) < _FAR
    return np.where((solved & inside)[:, None], found, np.nan)

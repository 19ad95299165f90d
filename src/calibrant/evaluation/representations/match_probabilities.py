"""Whether predicted probabilities that two images match are right: calibration, and scores."""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import xarray as xr
from scipy.special import logit
from torch import Tensor

from calibrant.errors import DataError, InferenceError
from calibrant.evaluation.representations.inputs import class_numbers, image_numbers
from calibrant.evaluation.statistics.arrays import Array, Given, numbers
from calibrant.evaluation.statistics.counted import counted_mean
from calibrant.evaluation.statistics.recalibration import counted_recalibration
from calibrant.evaluation.statistics.resampling import Estimate, Groups, bootstrap
from calibrant.evaluation.statistics.settings import whole
from calibrant.streams import stream

Bins = Literal["equal-mass", "equal-width"]
Variables = dict[str, tuple[tuple[str, ...], Any]]

_LEAST = 1e-12  # probabilities closer to 0 or 1 have the log odds of this one


def match_calibration(
    probabilities: Given,
    matches: Given,
    groups: npt.ArrayLike | Tensor | None = None,
    *,
    bins: int = 15,
    spacing: Bins = "equal-mass",
    resamples: int = 1000,
    seed: int = 0,
) -> xr.Dataset:
    """Calibration of the predicted probability that two images match, and its scores.

    The expected calibration error is never negative, so that of a calibrated prediction is not zero either: it stands
    beside what calibrated predictions with the same probabilities would have. The squared error is also given without
    that part, so that it is 0 on average if each bin is calibrated.

    Args:
        probabilities: predicted probability that the two images of a pair match, `(pair,)`.
        matches: whether they do, 0 or 1, `(pair,)`.
        groups: pairs that depend on each other, such as those of one image or class, have one number or name here,
            `(pair,)`; the bootstrap resamples them as a whole. Without them, pairs are taken to be independent.
        bins: number of bins; bins without pairs have NaN.
        spacing: bins with equally many pairs, or of equal width, as in most publications.
        resamples: number of bootstrap resamples, and of simulated outcomes of calibrated predictions.
        seed: random seed for both.

    Returns:
        Over `bin`: `predicted`, the mean probability, `observed`, the share that matches, with its interval, and
        `count`. Scalars: `calibration_error`, the mean over pairs of `|predicted − observed|` of their bin;
        `calibration_error_calibrated` and `…_calibrated_high`, its mean and 95% quantile if all pairs are independent
        and match with their probabilities, and `calibration_p`, the share of such simulations that are as large;
        `calibration_error_squared`, the mean square without its bias, which may be negative, with its standard error.
        `brier`, the mean squared error; `log_score`, −log of the probability of what happened, in nats per pair,
        infinite and without interval if that was 0; `base_rate`, the share that matches; `intercept` and `slope` of
        logistic recalibration: 0 and 1 for a calibrated prediction, a slope below 1 for one that is too sure, NaN if
        matches are separated perfectly. The last five have `…_se`, `…_low` and `…_high`, the ends of the 95% interval.

    Raises:
        DataError: for arrays that do not belong together, or are no probabilities or outcomes.
        InferenceError: for settings that cannot be used.
    """
    y = numbers(matches, "matches").reshape(-1)
    p = image_numbers(probabilities, len(y), "probabilities")
    if not len(y) or not np.isin(y, (0, 1)).all() or p.min() < 0 or p.max() > 1:
        raise DataError("give matches that are 0 or 1, with a probability between 0 and 1 for each")
    whole(bins, "bins", 1)
    if spacing not in ("equal-mass", "equal-width"):
        raise InferenceError(f"spacing={spacing!r}: give 'equal-mass' or 'equal-width'")
    units = np.arange(len(y)) if groups is None else class_numbers(groups, len(y), "groups")
    of, count = _bins(p, bins, spacing)
    variables = _scores(p, y, units, resamples, seed) | _curve(p, y, of, count, (units, resamples, seed))
    variables |= _errors(p, y, of, count, (units, resamples, seed))
    attrs = {"pairs": len(y), "units": int(units.max()) + 1, "spacing": spacing, "resamples": resamples, "seed": seed}
    return xr.Dataset(variables, {"bin": np.arange(count)}, attrs)


def _bins(p: Array, bins: int, spacing: Bins) -> tuple[Groups, int]:
    """The bin of every pair; equal probabilities are in one bin."""
    if spacing == "equal-width":
        return np.minimum((p * bins).astype(np.int64), bins - 1), bins
    edges = np.unique(np.quantile(p, np.arange(1, bins) / bins, method="lower"))
    used, of = np.unique(np.searchsorted(edges, p, side="right"), return_inverse=True)
    return of, len(used)


def _scores(p: Array, y: Array, units: Groups, resamples: int, seed: int) -> Variables:
    with np.errstate(divide="ignore"):
        surprise = -np.log(np.where(y == 1, p, 1 - p))
    found = bootstrap(counted_mean((p - y) ** 2), [units], resamples, seed).variables("brier")
    if np.isfinite(surprise).all():
        found |= bootstrap(counted_mean(surprise), [units], resamples, seed).variables("log_score")
    else:
        found |= Estimate(*np.array([np.inf, np.nan, np.nan, np.nan])).variables("log_score")
    found |= bootstrap(counted_mean(y), [units], resamples, seed).variables("base_rate")
    logits = logit(np.clip(p, _LEAST, 1 - _LEAST))
    both = bootstrap(counted_recalibration(logits, y), [units], resamples, seed)
    return found | both.part(0).variables("intercept") | both.part(1).variables("slope")


def _curve(p: Array, y: Array, of: Groups, count: int, how: tuple[Groups, int, int]) -> Variables:
    units, resamples, seed = how
    inside = np.eye(count)[of]
    sizes = np.bincount(of, minlength=count)
    with np.errstate(invalid="ignore", divide="ignore"):
        predicted = np.bincount(of, p, count) / sizes

    def observed(counts: Array) -> Array:
        with np.errstate(invalid="ignore", divide="ignore"):
            return (counts * y) @ inside / (counts @ inside)

    found = bootstrap(observed, [units], resamples, seed).variables("observed", ("bin",))
    return found | {"predicted": (("bin",), predicted), "count": (("bin",), sizes)}


def _errors(p: Array, y: Array, of: Groups, count: int, how: tuple[Groups, int, int]) -> Variables:
    """Calibration errors: as they are, as calibrated predictions would have them, and without bias."""
    units, resamples, seed = how
    generator = np.random.default_rng(stream(seed, "calibrated"))
    found = _error(p - y, of, count)
    calibrated = np.array([_error(p - (generator.random(len(p)) < p), of, count) for _ in range(resamples)])
    square, error = _squared(p - y, of, count, units)
    return {
        "calibration_error": ((), found),
        "calibration_error_calibrated": ((), calibrated.mean()),
        "calibration_error_calibrated_high": ((), np.quantile(calibrated, 0.95)),
        "calibration_p": ((), (1 + (calibrated >= found - 1e-12).sum()) / (1 + resamples)),
        "calibration_error_squared": ((), square),
        "calibration_error_squared_se": ((), error),
    }


def _error(residuals: Array, of: Groups, count: int) -> float:
    return float(np.abs(np.bincount(of, residuals, count)).sum() / len(of))


def _squared(residuals: Array, of: Groups, count: int, units: Groups) -> tuple[float, float]:
    """Mean square of the bins' mean residuals without the part that is chance, and its standard error.

    The variance of a mean comes from the sums over the units of its bin; bins with one unit are left out.
    """
    total = variance = least = 0.0
    weights = 0
    for place in range(count):
        inside = of == place
        size = int(inside.sum())
        _, unit = np.unique(units[inside], return_inverse=True)
        parts = int(unit.max(initial=-1)) + 1
        if parts < 2:
            continue
        mean = residuals[inside].mean()
        noise = (np.bincount(unit, residuals[inside] - mean) ** 2).sum() / size**2 * parts / (parts - 1)
        total += size * (mean**2 - noise)
        variance += size**2 * (4 * mean**2 * noise - 2 * noise**2)
        least += size**2 * 2 * noise**2
        weights += size
    if not weights:
        return float("nan"), float("nan")
    return total / weights, float(np.sqrt(max(variance, least))) / weights

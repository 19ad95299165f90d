"""Statistics of single data for predictive checks, and the comparison of one data set with replicates of it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import prod
from typing import Any

import numpy as np
import numpy.typing as npt
import pyro.distributions as dist
import torch
from torch import Tensor

from calibrant.errors import InferenceError
from calibrant.models.parts.likelihoods.grey import grey_values
from calibrant.program.contract import Values
from calibrant.program.supports import base_support, innermost

Array = npt.NDArray[np.float64]
Function = Callable[[Tensor], Tensor]

BANDS = ("power low", "power middle", "power high")
_SMALLEST_SPECTRUM = 8  # least number of pixels on the shorter side, so that every band has frequencies
_SMALLEST_SHAPE = 8  # least number of entries of an event for which the kurtosis is a default statistic
_FLOOR = 1e-6  # smallest power of a band, relative to the observed power, so that its logarithm is finite


@dataclass(frozen=True)
class Statistic:
    """A function `(rows, *event)` → `(rows,)` of one observed site."""

    label: str
    site: str
    function: Function

    def __call__(self, values: Values) -> Tensor:
        """The statistic of every row, float64.

        Raises:
            InferenceError: for a result of another shape, or that is not finite.
        """
        rows = values[self.site]
        found = torch.as_tensor(self.function(rows), device=rows.device)
        if found.shape != rows.shape[:1]:
            raise InferenceError(
                f"statistic {self.label!r} gives shape {tuple(found.shape)} for values {tuple(rows.shape)}, wanted "
                f"({len(rows)},): one number per row"
            )
        if not found.isfinite().all():
            raise InferenceError(
                f"statistic {self.label!r} is not finite for some data, observed or simulated: bound it (for example, "
                "add a small number before a logarithm or a division)"
            )
        return found.double()


def choose_statistics(
    sites: Mapping[str, Any], observed: Values, own: Mapping[str, Function] | None
) -> list[Statistic]:
    """The default statistics of every observed site, then the user's, which replace defaults with the same label.

    Args:
        sites: observed site → its distribution in a run of the program.
        observed: site → some observations.
        own: the user's statistics, name → function; they are applied to every observed site.
    """
    found: dict[str, Statistic] = {}
    for name, fn in sites.items():
        for statistic, function in {**_defaults(fn, observed[name]), **(own or {})}.items():
            label = statistic if len(sites) == 1 else f"{statistic} of {name}"
            found[label] = Statistic(label, name, function)
    return list(found.values())


def _defaults(fn: Any, values: Tensor) -> dict[str, Function]:
    event = values.shape[1:]
    if prod(event) == 1:
        return {"value": _mean}
    found: dict[str, Function] = {"mean": _mean}
    if fn.support.is_discrete and base_support(fn.support) is not grey_values:
        if not isinstance(innermost(fn), dist.Bernoulli):
            found |= {"dispersion": _dispersion, "zeros": _zeros, "maximum": _maximum}
    else:
        found |= {"contrast": _contrast, "minimum": _minimum, "maximum": _maximum}
        if prod(event) >= _SMALLEST_SHAPE:
            found["kurtosis"] = _kurtosis
    return found | _spectrum(values)


def _flat(x: Tensor) -> Tensor:
    return x.reshape(len(x), -1)


def _mean(x: Tensor) -> Tensor:
    return _flat(x).mean(1)


def _contrast(x: Tensor) -> Tensor:
    return _flat(x).std(1, correction=0)


def _minimum(x: Tensor) -> Tensor:
    return _flat(x).amin(1)


def _maximum(x: Tensor) -> Tensor:
    return _flat(x).amax(1)


def _zeros(x: Tensor) -> Tensor:
    return (_flat(x) == 0).double().mean(1)


def _dispersion(x: Tensor) -> Tensor:
    """Variance over mean: 1 for Poisson counts of one rate; 0 if all entries are 0."""
    return _flat(x).var(1, correction=0) / _mean(x).clamp_min(1e-12)


def _kurtosis(x: Tensor) -> Tensor:
    """E(x − m)⁴ / sd⁴ over the entries: 3 for a Normal; 0 if all entries are equal."""
    centred = _flat(x) - _mean(x)[:, None]
    return (centred**4).mean(1) / (centred**2).mean(1).square().clamp_min(1e-24)


def _spectrum(values: Tensor) -> dict[str, Function]:
    """Log power (nats) in three bands of radial frequency, equally wide in its log; empty if there is no image."""
    event = values.shape[1:]
    if len(event) not in (2, 3):
        return {}
    last = len(event) == 3 and event[-1] == 3 and event[0] > 3  # colours
    height, width = event[:2] if last else event[-2:]
    if min(height, width) < _SMALLEST_SPECTRUM:
        return {}
    edges = np.geomspace(1.0 / min(height, width), 0.5, len(BANDS) + 1)
    frequency = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width)[None])
    band = np.digitize(frequency, edges[1:-1])
    masks = [torch.as_tensor((band == i) & (frequency > 0)) for i in range(len(BANDS))]

    def power(x: Tensor, mask: Tensor) -> Tensor:
        x = x.movedim(-1, 1) if last else x
        spectrum = torch.fft.rfft2(x).abs().square() / (height * width)
        return _flat(spectrum[..., mask.to(x.device)]).mean(1)

    def function(mask: Tensor) -> Function:
        floor = _FLOOR * float(power(values.double(), mask).mean())
        return lambda x: (power(x, mask) + floor).clamp_min(1e-300).log()

    return {name: function(mask) for name, mask in zip(BANDS, masks, strict=True)}


# -- one data set against replicates -----------------------------------------------------------------------------------


def transport(ours: Array, theirs: Array) -> dict[str, float]:
    """1-Wasserstein distance of a data set from its replicates, and its distribution under the model.

    W = ∫ |F − G| dx with F of one data set and G of all other data sets together. Under the model a data set and its
    replicates are exchangeable, and all are treated alike: W is computed from the pool of all, and is R/(R + 1) times
    the distance from all others. So the p-value (the share of data sets as far off) is exact for any distribution.

    Args:
        ours: values of the data set, `(data,)`.
        theirs: values of the replicates, `(replicate, data)`.

    Returns:
        `wasserstein` ± `wasserstein_se` (the error of the one data set, which means little near the null),
        `wasserstein_null` and `wasserstein_null_sd` (mean and sd over replicates), in the units of the values, and `p`.
    """
    sets = np.sort(np.concatenate([ours[None], theirs]), 1)
    pool = np.sort(sets, axis=None).reshape(sets.shape[1], -1)  # row i: the values matched with the i-th value
    distances = np.array([np.abs(values[:, None] - pool).mean() for values in sets]) * len(sets) / (len(sets) - 1)
    sign = np.sign(sets[0] - pool.mean(1))
    potential = np.concatenate([[0.0], np.cumsum(0.5 * (sign[1:] + sign[:-1]) * np.diff(sets[0]))])
    null = distances[1:]
    return {
        "wasserstein": float(distances[0]),
        "wasserstein_se": float(potential.std() / np.sqrt(len(potential))),
        "wasserstein_null": float(null.mean()),
        "wasserstein_null_sd": float(null.std(ddof=1)),
        "p": float((1 + (null >= distances[0]).sum()) / len(distances)),
    }


@dataclass(frozen=True)
class Moments:
    """Mean and sd of values, and the influence of every datum on the mean (in sd) and on the log sd."""

    mean: float
    sd: float
    of_mean: Array
    of_log_sd: Array


def moments(values: Array, squares: Array | None = None) -> Moments:
    """Moments of one value per datum, or of several values per datum, given their means and mean squares."""
    squares = values**2 if squares is None else squares
    mean = values.mean()
    deviation = squares - 2.0 * mean * values + mean**2
    sd = np.sqrt(max(deviation.mean(), 0.0))
    if sd <= 1e-12 * abs(mean):  # a constant, up to rounding
        return Moments(float(mean), 0.0, np.full_like(values, np.nan), np.full_like(values, np.nan))
    return Moments(float(mean), float(sd), (values - mean) / sd, 0.5 * (deviation / sd**2 - 1.0))


def differences(ours: Moments, theirs: Moments) -> dict[str, float]:
    """`mean_difference` (ours − theirs, in their sd) and `sd_ratio` (ours/theirs), each with `_se`; NaN without sd."""
    if not ours.sd or not theirs.sd:
        return dict.fromkeys(("mean_difference", "mean_difference_se", "sd_ratio", "sd_ratio_se"), np.nan)
    difference, ratio = (ours.mean - theirs.mean) / theirs.sd, ours.sd / theirs.sd
    log_error = np.hypot(_error(ours.of_log_sd), _error(theirs.of_log_sd))
    return {
        "mean_difference": difference,
        "mean_difference_se": float(
            np.hypot(ratio * _error(ours.of_mean), _error(theirs.of_mean + difference * theirs.of_log_sd))
        ),
        "sd_ratio": ratio,
        "sd_ratio_se": float(ratio * log_error),
    }


def _error(influence: Array) -> float:
    return float(influence.std(ddof=1) / np.sqrt(len(influence)))

"""Bow ties: how the spread of one unit's response depends on the size of another's."""

from __future__ import annotations

from typing import Any

import numpy as np
import xarray as xr

from calibrant.errors import InferenceError
from calibrant.evaluation.statistics.arrays import Given, numbers
from calibrant.evaluation.uncertainty.moments import Array

PARTS = ("lower", "central", "upper")

_QUANTILES = (0.25, 0.75)
_BLOCKS = 20  # parts of the images that are left out in turn, for the errors
_BINS, _RANGE = 20, 3.0  # of the histogram, in sds by quartiles
_OF_QUARTILES = 0.7413  # sd of a Normal over the distance of its quartiles
_FEW = 30  # responses below which a column of the histogram is not told
_LEAST = 200  # images


def bow_tie(response: Given, units: int = 100) -> xr.Dataset:
    """How much more one unit's response varies where another unit responds strongly, whatever its sign.

    The responses of linear filters to natural images vary together: their joint histogram has the form of a bow tie,
    narrow where one is small (Schwartz & Simoncelli 2001; arXiv 2404.15390). Responses that are normalised by a pool do
    not. Of each ordered pair of units, the standard deviation of the first is taken over images where the second lies
    below its 25th percentile, above its 75th (the flanks), and between (the centre).

    Args:
        response: responses `(image, unit)`: linear drives, posterior means, or predictions.
        units: number of units that are used, from the first.

    Returns:
        `flare`, the flanks' standard deviation over the centre's, less 1, averaged over pairs: 0 without a bow tie.
        `effect`, the difference of the means over pairs of flanks and centre, over the average of the two standard
        deviations over pairs: the d′ of the paper with its sign. Both with `…_se`, by a jackknife over blocks of
        images. `sd` (part, unit, given) with the parts "lower", "central", "upper", in standard deviations of the unit
        (NaN for a unit given itself); `histogram` (bin, given_bin), the conditional histogram P(bin | given_bin) over
        all pairs and images, at `bin` and `given_bin` in standard deviations as the quartiles give them, which heavy
        tails do not move, from −3 to 3 (NaN where fewer than 30 responses lie in a given bin).

    Raises:
        InferenceError: for fewer than two units that respond, fewer than 200 images, or values that are not finite.
    """
    values = numbers(response)
    if values.ndim != 2 or min(values.shape[1], units) < 2 or len(values) < _LEAST:
        raise InferenceError(
            f"responses of the shape {values.shape} and units={units}: give (image, unit) with {_LEAST} images or "
            "more, and two units or more"
        )
    values = values[:, :units]
    spread = values.std(0)
    if not np.isfinite(values).all() or not (spread > 0).all():
        raise InferenceError(
            "responses are not finite, or the same for all images: leave out these images or units before bow_tie"
        )
    unit = (values - values.mean(0)) / spread
    table = _spreads(unit)
    blocks = np.arange(len(unit)) * _BLOCKS // len(unit)
    without = np.array([_summary(_spreads(unit[blocks != block])) for block in range(_BLOCKS)])
    errors = np.sqrt((_BLOCKS - 1) * without.var(0))
    centres = (np.arange(_BINS) + 0.5) * 2 * _RANGE / _BINS - _RANGE
    variables: dict[str, Any] = {
        "sd": (("part", "unit", "given"), table),
        "histogram": (("bin", "given_bin"), _histogram(unit)),
    }
    for name, value, error in zip(("flare", "effect"), _summary(table), errors, strict=True):
        variables |= {name: value, f"{name}_se": error}
    return xr.Dataset(variables, {"part": list(PARTS), "bin": centres, "given_bin": centres}, {"images": len(unit)})


def _spreads(unit: Array) -> Array:
    """Standard deviation of every unit over the images of each part of every other unit, `(part, unit, given)`."""
    low, high = np.quantile(unit, _QUANTILES, axis=0)
    parts = np.stack([unit < low, (unit >= low) & (unit <= high), unit > high]).astype(np.float64)
    count = parts.sum(1)[:, None]
    mean, square = (np.einsum("ni,pnj->pij", power, parts, optimize=True) / count for power in (unit, unit**2))
    found = np.sqrt(np.maximum(square - mean**2, 0.0))
    found[:, np.arange(unit.shape[1]), np.arange(unit.shape[1])] = np.nan
    return found


def _summary(table: Array) -> tuple[float, float]:
    """Flare and effect of standard deviations `(part, unit, given)`."""
    pairs = ~np.isnan(table[0])
    lower, centre, upper = (part[pairs] for part in table)
    flanks = np.concatenate([lower, upper])
    flare = (flanks.reshape(2, -1).mean(0) / centre - 1).mean()
    return float(flare), float((flanks.mean() - centre.mean()) / (0.5 * (flanks.std() + centre.std())))


def _histogram(unit: Array) -> Array:
    """P(bin | given bin) over all pairs of different units, `(bin, given bin)`."""
    spread = np.diff(np.quantile(unit, _QUANTILES, axis=0), axis=0) * _OF_QUARTILES
    place = np.floor((unit / spread + _RANGE) / (2 * _RANGE) * _BINS)
    counts = np.stack([(place == value).sum(1) for value in range(_BINS)], 1).astype(np.float64)
    joint = counts.T @ counts - np.diag(counts.sum(0))
    return np.where(counts.sum(0) >= _FEW, joint / np.maximum(joint.sum(0), 1.0), np.nan)

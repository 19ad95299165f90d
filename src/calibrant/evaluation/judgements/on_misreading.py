"""A mistake that is named where a check fails: a variance that is read as a standard deviation, and its like.

An encoder that returns a variance, and is read as if it returned an sd, gives a guide whose sds are the squares of the
right ones. So the log sds of the guide are a multiple of those of the reference, with no constant added: 2 times for a
variance read as an sd, ½ times for an sd read as a variance, −2 and −1 times for a precision.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import xarray as xr

from calibrant.evaluation.judgements.decisions import Verdict

Array = npt.NDArray[np.float64]

MISREAD = "misread output"
_LEAST = math.log(1.25)  # root mean square error of the log sds below which nothing is named
_LEFT = 0.25  # largest share of the mean square error of the log sds that the mistake may leave unexplained
_BETTER = 0.65  # the same, in comparison with errors of other kinds: one factor for all sds, a power of the likelihood
_LITTLE = 0.03  # share that is left unexplained so little that an unclear slope will do, if
_NEAR = 0.1  # the log sds agree on average within this
_SLOPE = 0.3  # largest relative error of the slope
_CLEAR = 3.3  # standard errors that the slope is away from that of a right guide
_VARIES = 0.1  # sd of the log sds from which a slope is known
_SITES = 4  # latents whose sds differ, without which one latent's sds have to vary between data
_EXACT, _EXACT_SE = math.log(1.03), 0.01  # where no slope is known: largest error of each latent, and of its error
_BLOCKS = 20  # blocks of data that are left out in turn, for the standard error of the slope
_POWERS_OF_LIKELIHOOD = np.exp(np.linspace(-6.0, 6.0, 49))


@dataclass(frozen=True)
class _Mistake:
    """The log sds of the guide are `power` times the right ones; what was read as what, and what repairs it."""

    power: float
    relation: str
    words: str
    output: str
    log_output: str


_MISTAKES = (
    _Mistake(2.0, "the squares of", "a variance is read as a standard deviation", "variance", "log_variance"),
    _Mistake(0.5, "the square roots of", "a standard deviation is read as a variance", "scale", "log_scale"),
    _Mistake(
        -2.0, "one over the squares of", "a precision is read as a standard deviation", "precision", "log_precision"
    ),
    _Mistake(-1.0, "one over", "a precision is read as a variance", "precision", "log_precision"),
)


@dataclass(frozen=True)
class _LogSds:
    """Log sds of a site, all arrays `(data, latent)`.

    Attributes:
        reference: those of the reference.
        error: those of the guide minus those of the reference.
        noise: Monte Carlo variance of `error`.
        noise_of_reference: the part of it that is the reference's.
    """

    reference: Array
    error: Array
    noise: Array
    noise_of_reference: Array

    def left(self, power: float) -> float:
        """Mean square of what a mistake leaves unexplained, without noise."""
        noise = self.noise + (power**2 - 1.0) * self.noise_of_reference
        return float((self.rest(power) ** 2 - noise).mean())

    def rest(self, power: float) -> Array:
        return self.error - (power - 1.0) * self.reference

    def left_by_a_factor(self) -> float:
        """The same for guides whose sds are off by one factor."""
        return float(((self.error - self.error.mean()) ** 2 - self.noise).mean())

    def left_by_a_power(self) -> float:
        """The same for guides that follow the best power of the likelihood; the widest sds are those of the prior."""
        x = self.reference - np.quantile(self.reference, 0.99)
        gain = np.expm1(-2.0 * np.minimum(x, 0.0))
        errors = [-0.5 * np.log1p(power * gain) - np.minimum(x, 0.0) for power in _POWERS_OF_LIKELIHOOD]
        return min(float(((self.error - error) ** 2 - self.noise).mean()) for error in errors)

    def slope(self, rows: npt.NDArray[np.bool_] | slice = slice(None)) -> float:
        """Slope of the guide's log sds on the reference's, corrected for the noise of the reference."""
        x, error = self.reference[rows], self.error[rows]
        noise = float(self.noise_of_reference[rows].mean())
        covariance = float(((x - x.mean()) * (error - error.mean())).mean())
        return 1.0 + (covariance + noise) / max(float(x.var()) - noise, 1e-12)

    def slope_se(self) -> float:
        """Its standard error, from leaving out blocks of data in turn."""
        count = min(_BLOCKS, len(self.error))
        block = np.arange(len(self.error)) % count
        found = np.array([self.slope(block != left_out) for left_out in range(count)]) if count > 1 else np.zeros(1)
        return float(np.sqrt((count - 1) * found.var())) if count > 1 else math.inf

    def has_slope(self) -> bool:
        """Whether log sds vary between data, or between many latents, so that a slope is known."""
        noise, x = float(self.noise_of_reference.mean()), self.reference
        between_data = float((x - x.mean(0)).var()) - noise > _VARIES**2
        return between_data or (x.shape[1] >= _SITES and float(x.mean(0).var()) > _VARIES**2)


def misread_output(result: xr.Dataset | None) -> Verdict | None:
    """Name the mistake, if the guide's sds are a power of the reference's; it only describes.

    It is named only if the error of the log sds is above 25% in root mean square, if the mistake explains most of its
    square, and more than one factor for all sds or a power of the likelihood do, and if the slope of the guide's log
    sds on the reference's agrees with it, and differs from 1 unless the mistake explains 97%. Where no slope is known,
    because all sds are alike, every latent has to agree within 3%. An exact guide is never named; guides with errors of
    other kinds are in at most 1% of the cases of `tests/test_misreading.py`.

    Args:
        result: the result of `compare`; None, or a result without `reference_log_sd`, names nothing.
    """
    if result is None or "reference_log_sd" not in result:
        return None
    for site, sds in _sites(result):
        for mistake in _MISTAKES:
            if _bears(sds, mistake.power):
                return _verdict(site, sds, mistake)
    return None


def _sites(result: xr.Dataset) -> Iterator[tuple[str, _LogSds]]:
    """The local sites whose sds can be judged, with their log sds."""
    light = ~result["heavy"].values.astype(bool) if "heavy" in result else np.ones(result.sizes["latent"], dtype=bool)
    names = result["site"].values
    for site in dict.fromkeys(names.tolist()):
        part = result.isel(latent=np.flatnonzero((names == site) & light))
        x, ratio, se = (part[name].values for name in ("reference_log_sd", "sd_ratio", "sd_ratio_se"))
        known = (np.isfinite(x) & np.isfinite(se) & (ratio > 0)).all(1)
        if not x.shape[1] or not known.any():
            continue
        x, ratio, se = x[known], ratio[known], se[known]
        noise = (se / ratio) ** 2
        of_guide = 1.0 / (2.0 * max(1, int(result.attrs["amortized_draws"])))
        yield site, _LogSds(x, np.log(ratio), noise, np.maximum(noise - of_guide, 0.0))


def _bears(sds: _LogSds, power: float) -> bool:
    """Whether log sds bear the mark of a mistake."""
    error, left = sds.left(1.0), sds.left(power)
    if error < _LEAST**2 or left > _LEFT * error:
        return False
    if not sds.has_slope():
        rest = sds.rest(power).mean(0)
        se = float(np.sqrt(sds.noise.mean() / len(sds.noise)))
        return se < _EXACT_SE and bool((np.abs(rest) < _EXACT + 2.6 * se).all())
    others, slope = min(sds.left_by_a_factor(), sds.left_by_a_power()), sds.slope()
    if left > others or abs(slope - power) > _SLOPE * abs(power - 1.0):
        return False
    by_size = left < _LITTLE * error and abs(float(sds.rest(power).mean())) < _NEAR
    return by_size or (left < _BETTER * others and abs(slope - 1.0) > _CLEAR * sds.slope_se())


def _verdict(site: str, sds: _LogSds, mistake: _Mistake) -> Verdict:
    slope, se = sds.slope(), sds.slope_se()
    size = f" (log sds are {slope:.2f} ± {se:.2f} times as large)" if sds.has_slope() else ""
    sentence = (
        f"the guide's sds of `{site}` are {mistake.relation} the right ones{size}, as where {mistake.words}: read the "
        f'encoder\'s output by from_encoder(encoder, "loc, {mistake.output}"), or "loc, {mistake.log_output}" where it '
        "is a log"
    )
    return Verdict(site, MISREAD, "describes", slope, se, math.nan, sentence, primary=False)


def output_of(verdict: Verdict) -> str:
    """The `output` of `from_encoder` that repairs the mistake of a verdict, where the encoder returns no log."""
    return f"loc, {min(_MISTAKES, key=lambda mistake: abs(mistake.power - verdict.effect)).output}"

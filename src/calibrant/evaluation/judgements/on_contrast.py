"""Verdicts on the contrast experiment: how the model's exact posterior behaves, and whether the guide follows it.

The model should show the normative pattern: an sd near the prior's for images below the noise, which falls with
contrast. A flat curve is the failure of the model, and a guide that reproduces the flat curve passes. Flatness is
tested before ranks, because the ranks of a flat curve are noise. As in `verdicts`, statements are about the images
that were shown: errors are those of the draws, and with m statistics the limits lie z = Φ⁻¹(1 − 1e-5 / (2m)) standard
errors out.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import xarray as xr
from scipy.special import ndtri

from calibrant.evaluation.judgements.decisions import Status, Verdict
from calibrant.evaluation.judgements.on_marginals import SD_MARGIN
from calibrant.evaluation.judgements.wording import percent
from calibrant.evaluation.statistics.comparison import LEFT_OUT_LIMIT
from calibrant.evaluation.uncertainty.contrast import UNITS
from calibrant.evaluation.uncertainty.refused import is_decided

ERROR = 1e-5  # probability that any of the statements is wrong
FLAT = 0.05  # range in prior sds below which a curve is flat, however small its errors
START = 0.8  # least posterior sd at the lowest contrast, in prior sds
MONOTONE = -0.9  # largest Spearman rank correlation of sd and contrast for a falling curve

_LINEAR_THEORY = (
    " (theory: with a linear decoder, Gaussian noise and a Normal prior the posterior covariance does not depend on "
    "the image)"
)

Array = npt.NDArray[np.float64]


def contrast_verdicts(result: xr.Dataset) -> list[Verdict]:
    """Judge a contrast experiment: the model first, then its guide.

    Args:
        result: the result of `contrast_experiment`.

    Returns:
        `site` "model": the exact posterior sd, which should fall from the prior's (at least 0.8 of it at the lowest
        contrast, Spearman at most −0.9). Its effect is the change from the lowest to the highest contrast, or, where a
        curve fails without being flat, the largest change between two contrasts. `site` "guide": the posterior sd and,
        where there is a scale, its coefficient of variation, which should agree with the exact ones within a factor of
        1.1 at every contrast. If more than 5% of the references fail the gate, no verdict is "pass", and above 10%
        there is none. About black and mid-grey, where images carry information at every contrast, the model's sd should
        fall, from wherever it starts.
    """
    found = [_model(result), _guide(result, "posterior_sd", "posterior sd")]
    if result.attrs["scale"]:
        found.append(_guide(result, "scale_cv", f"sd/mean of `{result.attrs['scale']}`"))
    return found


def _curve(result: xr.Dataset, name: str, source: str) -> tuple[Array, Array]:
    """The mean over images at every contrast, and its Monte Carlo error."""
    values, errors = (result[f"{name}_by_image{end}"].sel(source=source).values for end in ("", "_se"))
    count = np.maximum(np.isfinite(values).sum(1), 1)
    se = np.sqrt(np.nansum(errors**2, 1)) / count
    return np.where(np.isfinite(values).any(1), np.nansum(values, 1) / count, np.nan), se


def _known(result: xr.Dataset) -> bool:
    return bool(1.0 - result.attrs["share_reference"] <= LEFT_OUT_LIMIT)


def _decided(result: xr.Dataset) -> bool:
    return is_decided(float(result.attrs["share_reference"]))


def _limit(result: xr.Dataset) -> float:
    checks = result.sizes["contrast"] * (2 + bool(result.attrs["scale"]))
    return float(-ndtri(ERROR / (2 * checks)))


def _model(result: xr.Dataset) -> Verdict:
    prior = result.attrs["prior_sd"]
    curve, se = (part / prior for part in _curve(result, "posterior_sd", "exact"))
    kind = "exact" if result.attrs["reference_method"] == "exact" else "reference"
    head = f"model: the {kind} posterior sd"
    limit = _limit(result)
    status, said = _shape(curve, se, result, limit)
    is_flat = status == "fail" and _flat(curve, se, limit)
    first, last = _ends(curve) if status == "fail" and not is_flat else (0, -1)
    change, change_se = float(curve[last] - curve[first]), float(np.hypot(se[first], se[last]))
    margin = max(FLAT, 2.0 * limit * float(se.max())) if is_flat else FLAT
    if (status == "pass" and not _known(result)) or (status == "fail" and not _decided(result)):
        status, said = "cannot tell", f"{said}, but {_missing(result)}"
    return Verdict("model", "contrast", status, change, change_se, margin, f"{head} {said}", primary=False)


def _shape(curve: Array, se: Array, result: xr.Dataset, limit: float) -> tuple[Status, str]:
    """Status and words for the exact curve, in prior sds, over contrast."""
    if not np.isfinite(curve).all():
        return "cannot tell", f"is not known at every contrast: {_missing(result)}"
    if _is_noise(curve, se, limit) and limit * se.max() > FLAT:
        return "cannot tell", f"is not known well enough: its errors are up to {se.max():.2f} of the prior sd"
    if _flat(curve, se, limit):
        theory = _LINEAR_THEORY if result.attrs["structure"] == "linear-gaussian" else ""
        return "fail", f"is flat, {curve.mean():.2f} of the prior at every contrast{theory}: it should fall"
    rank, start, end = result.attrs["spearman_exact"], curve[0], curve[-1]
    spearman = f"{rank:.2f}".replace("-", "−")
    course = f"goes from {start:.2f} to {end:.2f} of the prior as contrast rises (Spearman {spearman})"
    if _rises(curve, se, limit):
        return "fail", f"{course}: it should fall steadily"
    starts = START if _about(result) == "mean" else 0.0
    if start + limit * se[0] < starts:
        return "fail", f"{course}: it should start near the prior, where the image lies below the noise"
    if rank > MONOTONE or start < starts:
        return "cannot tell", f"{course}: too near to the limit for its errors"
    return "pass", f"{course.replace('goes', 'falls', 1)}: as it should"


def _is_noise(curve: Array, se: Array, limit: float) -> bool:
    """Whether a curve varies by no more than its errors."""
    return bool((np.abs(curve - curve.mean()) <= limit * se).all())


def _flat(curve: Array, se: Array, limit: float) -> bool:
    return _is_noise(curve, se, limit) or bool(np.ptp(curve) < FLAT)


def _ends(curve: Array) -> tuple[int, int]:
    """The contrasts, the lower one first, between which a curve changes most."""
    low, high = sorted((int(curve.argmin()), int(curve.argmax())))
    return low, high


def _about(result: xr.Dataset) -> str:
    return str(result.attrs.get("about", "mean"))  # results of earlier versions have no other


def _rises(curve: Array, se: Array, limit: float) -> bool:
    """Whether the curve is higher at some contrast than at a lower one, by more than errors and the limit `FLAT`."""
    rise = curve[None, :] - curve[:, None] - limit * np.hypot(se[None, :], se[:, None])
    return bool((np.triu(rise, 1) > FLAT).any())


def _guide(result: xr.Dataset, name: str, words: str) -> Verdict:
    """The largest deviation from the exact curve, on the log scale, where too narrow and too wide are alike."""
    (exact, exact_se), (ours, ours_se) = (_curve(result, name, source) for source in ("exact", "amortized"))
    error = np.log(np.maximum(ours, 1e-12) / exact)
    se = np.hypot(ours_se / np.maximum(ours, 1e-12), exact_se / exact)
    low, high, margin = error - _limit(result) * se, error + _limit(result) * se, float(np.log1p(SD_MARGIN))
    inside, outside = (low > -margin) & (high < margin), (low > margin) | (high < -margin)
    known = np.isfinite(error)
    worst = int(np.argmax(np.where(known, np.maximum(np.abs(low), np.abs(high)), -1.0)))
    if outside.any():
        worst = int(np.argmax(np.where(outside, np.abs(error), -1.0)))
    effect, effect_se = float(np.expm1(error[worst])), float(np.exp(error[worst]) * se[worst])
    at = f"at contrast {result['contrast'].values[worst]:.2g} {UNITS[_about(result)]}"
    failed = outside.any() and _decided(result)
    status: Status = "fail" if failed else "pass" if inside.all() and _known(result) else "cannot tell"
    amount = percent(abs(effect), effect_se)
    if status == "fail":
        side = "too small" if effect < 0 else "too large"
        said = f"its {words} is {side} by up to {amount} {at}"
    elif not known.all() or not _known(result):
        said = f"cannot tell whether its {words} follows the exact curve: {_missing(result)}"
    elif status == "pass":
        said = f"its {words} follows the exact curve within {_bound(max(-low.min(), high.max())):.0%} at every contrast"
    else:
        said = f"cannot tell whether its {words} follows the exact curve within {SD_MARGIN:.0%}: off by {amount} {at}"
    return Verdict("guide", name, status, effect, effect_se, SD_MARGIN, f"guide: {said}", primary=False)


def _bound(log_error: float) -> float:
    return float(np.ceil(100 * np.expm1(log_error)) / 100)


def _missing(result: xr.Dataset) -> str:
    return f"{1.0 - result.attrs['share_reference']:.0%} of the images × contrasts have no reference posterior"

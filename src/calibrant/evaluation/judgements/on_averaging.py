"""A mistake that is named where a check fails: a training whose error was averaged over the entries, not summed."""

from __future__ import annotations

import math

import numpy as np
import xarray as xr

from calibrant.evaluation.judgements.decisions import Verdict

AVERAGED = "averaged error"
_ENTRIES = 16  # with fewer, an average is hardly told from other errors
# How many times as large as those that a mistake leaves behind powers may be, or as small. Where the divergence was
# averaged too, other weights of it lie close by.
_NEAR, _NEAR_BOTH = 1.5, 1.1


def averaged_error(powers: xr.Dataset | None) -> Verdict | None:
    """Name the mistake, if the powers that a guide follows are those that it leaves behind; it only describes.

    Training with the mean of the squared errors of D entries, and the KL divergence summed over the latents, leaves the
    prior's power at 1, and that of a Gaussian with noise variance σ² at 2σ²/D; half of it if the error was halved, and
    m times as much if the divergence was averaged over the m entries of the latents, too.

    Args:
        powers: result of `powers_of`, or a dataset that holds it; None or another dataset names nothing.
    """
    if powers is None or "likelihood_power" not in powers or powers.attrs["entries"] < _ENTRIES:
        return None
    prior, power = (float(np.nanmedian(powers[name].values)) for name in ("prior_power", "likelihood_power"))
    if not (_is_near(prior, 1.0) and power > 0) or _is_near(power, 1.0):
        return None
    entries, latents, variance = (powers.attrs[name] for name in ("entries", "latents", "noise_variance"))
    errors = {1.0: "half the squared error", 2.0: "the squared error"} if variance > 0 else {1.0: "the error"}
    both = {latents * form: f"{words} and the KL divergence" for form, words in errors.items() if latents > 1}
    forms = {**both, **errors}
    found = power * entries / (variance or 1.0)
    form = min(forms, key=lambda form: abs(math.log(found / form)))
    if not _is_near(found, form, _NEAR_BOTH if form not in errors else _NEAR):
        return None
    sentence = _sentence(power, int(entries), forms[form], (entries / form) ** 0.5 if variance > 0 else None)
    return Verdict("all latents", AVERAGED, "describes", power, math.nan, math.nan, sentence, primary=False)


def _is_near(found: float, wanted: float, factor: float = _NEAR) -> bool:
    return found > 0 and abs(math.log(found / wanted)) < math.log(factor)


def _sentence(power: float, entries: int, what: str, scale: float | None) -> str:
    state = "" if scale is None else f", or state the model that was trained, a Gaussian with scale {scale:.4g}"
    were = "were" if " and " in what else "was"
    return (
        f"the guide follows the likelihood to the power {power:.2g}, as after a training in which {what} {were} "
        f"averaged over the {entries} entries of an observation: train with sums over entries{state}"
    )

"""Verdicts that need no reference: on the importance weights of a guide, and on the ranks of simulated latents."""

from __future__ import annotations

import math

import numpy as np
import xarray as xr
from scipy.stats import beta, binom

from calibrant.evaluation.judgements.decisions import (
    FALSE_PASS,
    Question,
    Statistic,
    Status,
    Verdict,
    limit,
    normal_statistic,
)
from calibrant.evaluation.judgements.wording import ceil, number
from calibrant.evaluation.statistics.simulation_ranks import uniformity
from calibrant.inference.reweighting import reliable

SHARE_MARGIN = 0.1  # largest share of the data with a large k-hat that passes
LEAST_DATA = math.ceil(math.log(FALSE_PASS / 2) / math.log(1 - SHARE_MARGIN))  # with fewer, all may be good by chance
JOINT_MARGIN = 0.15  # largest error of the log joint that passes: of its mean in sds, for two latents, and of its sd
GAP_MARGIN = 0.1  # largest evidence gap that passes, in nats per datum


def questions(weights: xr.Dataset | None, calibration: xr.DataTree | None) -> list[Question]:
    """The questions that decide: is k-hat small for nearly all data, and is the log joint where it should be?"""
    found = []
    if weights is not None:
        found.append(Question("all latents", "k-hat", [_large_khat(weights)]))
    if calibration is not None:
        found.append(Question("all latents", "log joint", _log_joint(calibration)))
    return found


def verdict(question: Question, status: Status, decisive: Statistic) -> Verdict:
    """The verdict on k-hat or on the log joint, with its sentence."""
    words = _khat_words if question.quantity == "k-hat" else _joint_words
    effect, se, sentence = decisive.effect, decisive.se, words(status, decisive)
    return Verdict(question.site, question.quantity, status, effect, se, decisive.margin, sentence)


def descriptions(weights: xr.Dataset | None) -> list[Verdict]:
    """The verdict on the evidence gap, which only describes: it is estimated from the guide's own draws."""
    if weights is None:
        return []
    values, errors = weights["gap"].values, weights["gap_se"].values
    mean, se = float(values.mean()), float(np.sqrt((errors**2).sum()) / len(errors))
    low, high = mean - limit(1) * se, mean + limit(1) * se
    status: Status = "fail" if low > GAP_MARGIN else "pass" if high < GAP_MARGIN else "cannot tell"
    sentence = f"the ELBO is {number(mean, se)} nats a datum below the log evidence, as far as its own weights see"
    if not np.isfinite(mean):
        sentence = "the ELBO is −∞: draws of the guide lie outside the model's support"
    return [Verdict("all latents", "evidence gap", status, mean, se, GAP_MARGIN, sentence, primary=False)]


# -- k-hat -------------------------------------------------------------------------------------------------------------


def _large_khat(weights: xr.Dataset) -> Statistic:
    """The share of the data whose weights can't be relied on, with its interval of Clopper and Pearson."""
    relied = reliable(weights)
    large, count = int((~relied).sum()), len(relied)
    tail = FALSE_PASS / 2
    low = float(beta.ppf(tail, large, count - large + 1)) if large else 0.0
    high = float(beta.isf(tail, large + 1, count - large)) if large < count else 1.0
    share = large / count
    p_value = float(binom.sf(large - 1, count, SHARE_MARGIN))
    note, se = f"{weights.attrs['good_k']:.2f}", float(np.sqrt(share * (1 - share) / count))
    return Statistic(f"{large} of {count}", note, share, se, low, high, p_value, SHARE_MARGIN, False)


def _khat_words(status: Status, found: Statistic) -> str:
    head = f"the importance weights can't be relied on for {found.label} data (k-hat above {found.note})"
    if status == "fail":
        return f"{head}: their tail is too heavy for weighing to mend the guide"
    if status == "pass":
        return f"{head}: weighing the guide's draws works for nearly all data"
    return f"{head}: cannot tell whether that is less than {SHARE_MARGIN:.0%} of all"


# -- the log joint -----------------------------------------------------------------------------------------------------


def _log_joint(calibration: xr.DataTree) -> list[Statistic]:
    """The mean of the true log joint among the draws' in sds, and the log of its sd relative to theirs.

    An error of 7.5% in the sds of all d latents moves it by 0.075 √(2d) sd, and widens it by 15%.
    """
    found = uniformity(calibration)
    row, latents = found.sel(quantity="log_joint"), max(2, found.attrs["latents"])
    bias, bias_se, spread, spread_se = (float(row[name]) for name in ("bias", "bias_se", "spread", "spread_se"))
    width = limit(2)
    return [
        normal_statistic("bias", "", bias, bias_se, JOINT_MARGIN * np.sqrt(latents / 2), width),
        normal_statistic("spread", "", float(np.log(spread)), spread_se / spread, JOINT_MARGIN, width),
    ]


def _joint_words(status: Status, found: Statistic) -> str:
    head = "on data that the model makes, the log joint of the truth"
    if found.label == "bias":
        where = "above" if found.effect > 0 else "below"
        effect = f"lies {number(abs(found.effect), found.se)} sd {where} that of the guide's draws"
        off = "the guide draws where the density is low (it is too wide, off, or ignores a dependency)"
        why = f": {off}" if found.effect > 0 else ": the guide keeps too close to the peak (it is too narrow)"
    else:
        ratio, se = float(np.exp(found.effect)), float(np.exp(found.effect) * found.se)
        effect = f"scatters {number(ratio, se)} times as widely as that of the guide's draws"
        why = ": how wide the guide is depends on the wrong things"
    if status == "pass":
        bound = ceil(found.reach, 2)
        unit = "sd" if found.label == "bias" else "on the log scale"
        return f"{head} lies among those of the guide's draws as it should, within {bound:.2f} {unit}"
    return (
        f"{head} {effect}{why}" if status == "fail" else f"{head} {effect}: cannot tell whether that is more than noise"
    )

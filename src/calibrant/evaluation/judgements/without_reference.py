"""Verdicts that need no reference: on the importance weights of a guide, and on ranks on simulated data."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import xarray as xr
from scipy.stats import beta, binom

from calibrant.evaluation.judgements.decisions import (
    FALSE_PASS,
    Question,
    Statistic,
    Status,
    Verdict,
    normal_statistic,
)
from calibrant.evaluation.judgements.wording import ceil, number
from calibrant.evaluation.statistics.simulation_ranks import uniformity
from calibrant.inference.reweighting import reliable

SHARE_MARGIN = 0.1  # largest share of the data with a large k-hat that passes
LEAST_DATA = math.ceil(math.log(FALSE_PASS / 2) / math.log(1 - SHARE_MARGIN))  # with fewer, all may be good by chance
RANK_MARGIN = 0.15  # largest error of ranks that passes: of their mean in sds, for two dimensions, and of their sd


def questions(
    weights: xr.Dataset | None, calibration: xr.DataTree | None, dimensions: float | None, sites: Sequence[str]
) -> list[Question]:
    """The questions that need no reference.

    Args:
        weights: result of `weights`: is k-hat small for nearly all data?
        calibration: result of `calibration`: are log joint and log likelihood where they should be?
        dimensions: number of dimensions that the likelihood informs; None if it is not known, and then the log
            likelihood is not asked about.
        sites: local sites whose ranks are asked about, because too many data have no reference.
    """
    found = []
    if weights is not None:
        found.append(Question("all latents", "k-hat", [_large_khat(weights)]))
    if calibration is None:
        return found
    ranks = uniformity(calibration)
    row = ranks.sel(quantity="log_joint")
    found.append(Question("all latents", "log joint", _bias_and_spread(row, "", ranks.attrs["latents"])))
    if dimensions is not None:
        row = ranks.sel(quantity="log_likelihood")
        found.append(Question("all latents", "log likelihood", _bias_and_spread(row, "", dimensions)))
    for site in sites:
        entries = ranks.isel(quantity=np.flatnonzero(ranks["site"].values == site))
        rows = [entries.isel(quantity=i) for i in range(entries.sizes["quantity"])]
        found.append(
            Question(site, "ranks", [s for row in rows for s in _bias_and_spread(row, row["quantity"].item(), 2)])
        )
    return found


def verdict(question: Question, status: Status, decisive: Statistic) -> Verdict:
    """The verdict on k-hat, or on a quantity of simulated data, with its sentence."""
    words = _khat_words if question.quantity == "k-hat" else _rank_words
    sentence = words(question, status, decisive)
    effect, se, margin = decisive.effect, decisive.se, decisive.margin
    return Verdict(question.site, question.quantity, status, effect, se, margin, sentence, entry=decisive.entry)


def descriptions(weights: xr.Dataset | None) -> list[Verdict]:
    """The evidence gap as far as the guide's own draws tell it, which only describes."""
    if weights is None:
        return []
    values, errors = weights["gap"].values, weights["gap_se"].values
    mean, se = float(values.mean()), float(np.sqrt((errors**2).sum()) / len(errors))
    sentence = f"evidence gap, estimated from the guide's own draws: {number(mean, se)} nats per datum"
    if not np.isfinite(mean):
        sentence = "the ELBO is −∞: some draws of the guide lie outside the support of the model"
    return [Verdict("all latents", "evidence gap", "describes", mean, se, np.nan, sentence, primary=False)]


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


def _khat_words(question: Question, status: Status, found: Statistic) -> str:
    large, _, count = found.label.partition(" of ")
    if count == "1":
        head = "unreliable (k-hat above" if large == "1" else "reliable (k-hat at most"
        return f"importance weights of the datum are {head} {found.note}), but one datum does not tell about others"
    if large == "0":
        head = f"importance weights are reliable for all {count} data (k-hat at most {found.note})"
        few = f"; with so few, cannot tell whether that holds for {1 - SHARE_MARGIN:.0%} of all data"
        return head if status == "pass" else head + few
    head = f"importance weights are unreliable for {found.label} data (k-hat above {found.note})"
    if status == "fail":
        return f"{head}: the guide is too far from the posterior for reweighting"
    if status == "pass":
        return f"{head}, which is few"
    return f"{head}; cannot tell whether these are fewer than {SHARE_MARGIN:.0%} of all data"


# -- simulated data ----------------------------------------------------------------------------------------------------


def _bias_and_spread(row: xr.Dataset, entry: str, dimensions: float) -> list[Statistic]:
    """The mean of the true value among the draws' in sds, and the log of its sd relative to theirs.

    An error of 7.5% in the sds of all d latents moves the log joint by 0.075 √(2d) sd, and widens it by 15%.
    """
    bias, bias_se, spread, spread_se = (float(row[name]) for name in ("bias", "bias_se", "spread", "spread_se"))
    margin = RANK_MARGIN * np.sqrt(max(2.0, dimensions) / 2)
    found = [
        normal_statistic("bias", "", bias, bias_se, margin),
        normal_statistic("spread", "", float(np.log(spread)), spread_se / spread, RANK_MARGIN),
    ]
    return [replace(one, entry=entry) for one in found]


def _rank_words(question: Question, status: Status, found: Statistic) -> str:
    what = f"`{found.entry}`" if found.entry else question.quantity
    if status == "pass":
        name = f"`{question.site}`" if question.quantity == "ranks" else what
        within = f"{name} within {ceil(found.reach, 2):.2f} sd"
        if found.label == "spread":
            within = f"spread of {name} within {ceil(float(np.expm1(found.reach)), 2):.0%}"
        return f"on simulated data the guide is calibrated ({within})"
    if found.label == "bias":
        where = "above" if found.effect > 0 else "below"
        said = f"the true {what} lies {number(abs(found.effect), found.se)} sd {where} that of the guide's draws"
    else:
        ratio, se = float(np.exp(found.effect)), float(np.exp(found.effect) * found.se)
        said = f"the true {what} varies {number(ratio, se)} times as much as among the guide's draws"
    doubt = "; cannot tell whether that is within the margin"
    return f"on simulated data, {said}{doubt if status == 'cannot tell' else _why(question, found)}"


def _why(question: Question, found: Statistic) -> str:
    if question.quantity == "ranks":
        return ""
    if found.label == "spread":
        return ": the guide's uncertainty varies in the wrong way between data"
    if found.effect < 0:
        return ": the guide stays too close to the peak (its uncertainty is too small)"
    if question.quantity == "log likelihood":
        return (
            ": the guide's draws explain the data worse than the truth does (too wide, off, or a dependency is missing)"
        )
    return ": the guide draws where the density is low (too wide, off, or a dependency is missing)"

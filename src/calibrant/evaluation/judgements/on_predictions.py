"""Predictive checks in plain language: descriptions with their errors, without a verdict."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import xarray as xr
from scipy.special import gammainccinv, ndtr, ndtri

from calibrant.evaluation.judgements.wording import number, percent
from calibrant.evaluation.statistics.data_statistics import BANDS

FALSE_ALARM = 0.01  # probability that any difference is named although there is none
_MANY = 0.25  # if only a share of data that is larger by this would have been seen, nothing was shown to agree
_FEW = 2.0  # if only a difference of so many sds would have been seen, nothing was shown to agree


def predictive_sentences(result: xr.Dataset) -> list[str]:
    """Describe the result of a predictive check, simulated data first; "±" is one standard error.

    With m comparisons in all, a difference is named if it lies z = Φ⁻¹(1 − .01/(2m)) standard errors out, and if no
    replicate of the data set is as far off. (Standard errors do not account for heavy tails, with which a difference
    may still be named for a true model in some per cent of checks.) If no difference is named, the data may be too few
    or the model good; the sentence therefore gives the size that would have been seen.

    Args:
        result: the result of `predictive_check`.
    """
    sizes = result.sizes
    checks = 2 * sizes["statistic"] + 2 * sizes["latent"] + sizes["statistic"] + 2 * sizes["observed"]
    limit = float(-ndtri(FALSE_ALARM / (2 * checks)))
    found = [*_tails(result, limit), *_entries(result, limit)]
    if "prior_p" not in result:
        return ["the prior is improper: the model generates no data of its own to compare", *found]
    return [*_prior(result, limit), *_aggregate(result, limit), *found]


def _prior(result: xr.Dataset, limit: float) -> Iterator[str]:
    quiet, visible = [], 0.0
    order = np.argsort(-np.abs(np.nan_to_num(result["prior_mean_difference"].values)), kind="stable")
    for label in result["statistic"].values[order].tolist():
        one = result.sel(statistic=label)
        said = list(_one_prior(one, label, limit))
        yield from said
        if not said:
            quiet.append(f"`{label}`")
            visible = max(visible, limit * float(one["prior_mean_difference_se"].fillna(0.0)))
    if quiet:
        yield (
            f"in {', '.join(quiet)}, simulated data agree with the data (a difference of {visible:.2f} sd between the "
            "means would have been seen)"
            if visible < _FEW
            else f"in {', '.join(quiet)}, simulated data and the data were not found to differ, but are too few or too "
            "varied for that"
        )


def _one_prior(one: xr.Dataset, label: str, limit: float) -> Iterator[str]:
    observed = one["observed_statistic"].values
    ours, theirs = float(one["prior_mean"]), float(observed.mean())
    difference, ratio = float(one["prior_mean_difference"]), float(one["prior_sd_ratio"])
    if float(one["prior_p"]) > _smallest(one, "statistic"):
        return
    if np.isnan(difference):
        constant = observed.std() <= 1e-12 * abs(theirs)
        data = "all data" if constant else "the data on average"
        yield f"`{label}` is {theirs:.3g} for {data}, and {ours:.3g} for simulated data on average"
        return
    error, ratio_error = float(one["prior_mean_difference_se"]), float(one["prior_sd_ratio_se"])
    too = "varied" if ratio > 1 else "alike"
    varies = f"{number(ratio, ratio_error)} times its sd over the data: simulated data are too {too} in this respect"
    wider = abs(np.log(ratio)) > limit * ratio_error / ratio
    if abs(difference) > limit * error:
        mean = _mean(one, label, ours, theirs, error * float(observed.std()))
        yield f"{mean}; its sd over simulated data is {varies}" if wider else mean
    elif wider:
        yield f"the sd of `{label}` over simulated data is {varies}"
    elif float(one["prior_wasserstein"]) > _by_chance(limit, *(float(one[f"prior_{name}"]) for name in _NULL)):
        yield f"`{label}` has nearly the same mean and sd in simulated data and in the data, but another distribution"


def _by_chance(limit: float, mean: Any, sd: Any) -> Any:
    """The distance that chance exceeds as seldom as a normal variable exceeds `limit` sds; nearly a Gamma variable."""
    shape = (mean / sd) ** 2
    return mean / shape * gammainccinv(shape, ndtr(-limit))


def _smallest(result: xr.Dataset, dim: str) -> float:
    """A bound below which a p-value lies only if no replicate is as far off."""
    return 1.5 / (float(result.attrs[f"{dim}_replicates"]) + 1.0)


def _mean(one: xr.Dataset, label: str, ours: float, theirs: float, error: float) -> str:
    if label.partition(" of ")[0] in BANDS:
        times, where = float(np.exp(ours - theirs)), label.partition(" of ")[0].split()[1]
        found = number(times, times * error)
        return f"simulated data have {found} times the power of the data at {where} frequencies (`{label}`)"
    smallest = min(float(one[name].min()) for name in ("observed_statistic", "prior_statistic"))
    if smallest >= 0 and theirs > 0:
        return f"simulated data have {number(ours / theirs, error / theirs)} times the `{label}` of the data"
    away = number(abs(float(one["prior_mean_difference"])), float(one["prior_mean_difference_se"]))
    side = "above" if ours > theirs else "below"
    return f"`{label}` of simulated data lies {away} sd {side} that of the data, on average"


_COMPARED = ("mean_difference", "sd_ratio", "mean_difference_se", "sd_ratio_se", "wasserstein", "p")
_NULL = ("wasserstein_null", "wasserstein_null_sd")


def _aggregate(result: xr.Dataset, limit: float) -> Iterator[str]:
    for site in dict.fromkeys(result["site"].values.tolist()):
        part = result.isel(latent=np.flatnonzero(result["site"].values == site))
        value = {name: part[f"aggregate_{name}"].values for name in (*_COMPARED, *_NULL)}
        shift = np.abs(value["mean_difference"]) / value["mean_difference_se"]
        spread = np.abs(np.log(value["sd_ratio"])) * value["sd_ratio"] / value["sd_ratio_se"]
        excess = value["wasserstein"] - value["wasserstein_null"]
        chance = _by_chance(limit, *(value[name] for name in _NULL))
        far = (shift > limit) | (spread > limit) | (value["wasserstein"] > chance)
        far &= value["p"] < _smallest(result, "latent")
        if not far.any():
            visible = limit * float(value["mean_difference_se"].max())
            yield (
                f"`{site}`: pooled over the data, the guide's draws agree with the prior (a difference of "
                f"{visible:.2f} sd between the means would have been seen)"
            )
            continue
        worst = part.isel(latent=int(np.where(far, excess, -np.inf).argmax()))
        mean, sd = (
            number(float(worst[f"aggregate_{name}"]), float(worst[f"aggregate_{name}_se"]))
            for name in ("mean_difference", "sd_ratio")
        )
        many = f" in {int(far.sum())} of {len(far)} latents, most in `{worst['latent'].item()}`" if len(far) > 1 else ""
        yield (
            f"`{site}`: pooled over the data, the guide's draws differ from the prior{many}: mean {mean} prior sd off, "
            f"sd {sd} times the prior's, 1-Wasserstein distance {float(worst['aggregate_wasserstein']):.2f} prior sd "
            f"({float(worst['aggregate_wasserstein_null']):.2f} by chance)"
        )


def _tails(result: xr.Dataset, limit: float) -> Iterator[str]:
    level = float(result.attrs["level"])
    inside = f"the central {level:.0%} of its posterior predictive distribution"
    chance = float(np.sqrt(level * (1.0 - level) / result.sizes["data"]))
    said = False
    for label in result.sortby("extreme", ascending=False)["statistic"].values.tolist():
        one = result.sel(statistic=label)
        share, error = float(one["extreme"]), float(one["extreme_se"])
        own = _Own(one, "extreme", chance)
        wrong = own.share > 1.0 - level + limit * own.error
        wanted = min(own.share, 1.0 - level) if own.known else 1.0 - level
        if share - wanted > limit * np.hypot(error, chance):
            said = True
            yield f"for {percent(share, error)} of the data, `{label}` lies outside {inside}{own.words(wrong)}"
    if not said and limit * chance < _MANY:
        yield "the posterior predictive distributions reproduce all statistics that were compared"
    elif not said:
        yield (
            f"no statistic was found outside {inside} too often, but the data are too few to tell (misfits for "
            f"{min(1.0, 1 - level + limit * chance):.0%} of them would have been seen)"
        )


def _entries(result: xr.Dataset, limit: float) -> Iterator[str]:
    for site in result["observed"].values.tolist():
        for level in sorted({0.5, float(result.attrs["level"])}):
            one = result.sel(observed=site, level=level)
            held, error = float(one["coverage"]), float(one["coverage_se"])
            own = _Own(one, "coverage")
            wrong = own.share < level - limit * own.error
            head = f"{level:.0%} predictive intervals hold {percent(held, error)} of the entries of `{site}`"
            wanted = level if wrong or not own.known else own.share
            far = limit * np.hypot(error, 0.0 if wrong or not own.known else own.error)
            tail = own.words(wrong)
            if held < wanted - far:
                tail += ": too few, since the data spread more than predicted"
            elif held > wanted + far:
                more = "more is expected even of a true model, since each datum is used twice"
                tail += f": {more}" if wanted == level else ": too many, since the data spread less than predicted"
            yield head + tail


class _Own:
    """The same share for data that the model simulates; NaN if it simulates none."""

    def __init__(self, one: xr.Dataset, name: str, least: float = 0.0) -> None:
        self.known = f"{name}_null" in one
        self.share, self.error = np.nan, np.nan
        if self.known:
            self.share, self.error = float(one[f"{name}_null"]), max(float(one[f"{name}_null_se"]), least)

    def words(self, wrong: bool) -> str:
        """The share in brackets; `wrong` if an exact posterior could not give such a share."""
        if not self.known:
            return ""
        rest = ", for which the guide's posterior is wrong" if wrong else ""
        return f" ({percent(self.share, self.error)} for simulated data{rest})"

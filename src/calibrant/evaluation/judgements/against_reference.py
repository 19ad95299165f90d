"""Verdicts in plain language: for each latent site, can the guide's sd, mean and coverage be believed?

The verdicts on a comparison with a reference use, for each site:

- the signed error, averaged over data and latents (of the log sd ratio, the mean, the coverage);
- the debiased root-mean-square error over data and latents (log sd ratio, mean), because errors that differ in sign
  from datum to datum average to nothing;
- both again for every single latent, averaged over data only, because one wrong latent among many averages away too.

and the root-mean-square error of correlations, over all latents together and for every latent with all others. How
statistics become verdicts is in `decisions.py`; verdicts without a reference are in `without_reference.py`.

`pass` is about mean, sd, central coverage and linear correlation. A wrong shape with the right moments passes; to find
it, compare `wasserstein` with `wasserstein_null`, or use `c2st`. Standard errors are right if the draws resolve the
posterior's fourth moments (the tails of a LogNormal with σ beyond 1 are too heavy).

Errors are independent over data, since every datum has its own draws (with shared latents, whose draw moves all data
together, data are counted as fully correlated instead); over the latents of one datum they are not, since
a draw is shared by all of them. The latents of one datum are therefore counted as fully correlated: the standard error
of their average is the average of their standard errors, an upper bound for any correlation. This costs no `pass`,
because every single latent, whose error is as large, has to pass as well.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
import xarray as xr
from scipy.special import chdtrc, chdtri, ndtr

from calibrant.evaluation.judgements import without_reference as unaided
from calibrant.evaluation.judgements.decisions import (
    Direction,
    Question,
    Statistic,
    Status,
    Verdict,
    decide,
    limit,
    normal_statistic,
)
from calibrant.evaluation.judgements.wording import ceil, number, percent

Array = npt.NDArray[np.float64]

SD_MARGIN = 0.1
MEAN_MARGIN = 0.1
COVERAGE_MARGIN = 0.03
CORRELATION_MARGIN = 0.1


def verdicts(
    result: xr.Dataset | None, weights: xr.Dataset | None = None, calibration: xr.DataTree | None = None
) -> list[Verdict]:
    """Judge a guide site by site, and as a whole.

    Margins: sd within 10% (a factor of 1.1 either way), mean within 0.1 reference sd, coverage within 3 points,
    correlations within 0.1 (root mean square of a latent's with the others); k-hat good for 90% of the data; the log
    joint of simulated latents within 0.15 √(d / 2) sd, for d latents, two at least, and 15% of where the guide has it.
    If too many data have no reference (attribute `cannot_tell`), no verdict on the comparison is "pass".

    Args:
        result: the result of `compare`; None without a reference.
        weights: the result of `weights`, to judge the guide's importance weights as well; None to omit them.
        calibration: the result of `calibration`, to judge the log joint as well; None to omit it.

    Returns:
        For each latent site "sd", "mean" and "coverage", shared sites last; "correlation" over all latents, if there
        are two or more local ones; "k-hat" and "log joint", if they are known; and the "evidence gap", which only
        describes. All verdicts that decide form one family: the error rates of `evaluation.judgements.decisions` hold
        for all of them together.
    """
    compared = _questions(result) if result is not None else []
    questions = [*compared, *unaided.questions(weights, calibration)]
    found = [_verdict(q, *decided) for q, decided in zip(questions, decide(questions), strict=True)]
    if result is not None and result.attrs["cannot_tell"]:
        share = f"{result.attrs['share_left_out']:.0%} of the data have no reference posterior"
        found = [_withdrawn(v, share) if v.status == "pass" and v.quantity in _MARGINS else v for v in found]
    return [*found, *unaided.descriptions(weights)]


def _questions(result: xr.Dataset) -> list[Question]:
    """The questions that a comparison answers."""
    groups = list(_groups(result))
    width = _limit([len(group.labels) for group in groups], result.sizes["latent"])
    level = float(result.attrs["coverage_level"])
    asked = [
        Question(group.site, quantity, _statistics(group, quantity, level, width), level)
        for group in groups
        for quantity in ("sd", "mean", "coverage")
    ]
    if result.sizes["latent"] > 1:
        statistics = _correlation_statistics(result, width)
        asked.append(Question("all latents", "correlation", statistics))
    return asked


@dataclass(frozen=True)
class _Group:
    """The part of a comparison that belongs to one site; a shared site is treated as one datum."""

    site: str
    labels: list[str]
    values: dict[str, Array]  # `(data, latent)`
    together: bool  # whether a shared draw moves the errors of all data at once


def _groups(result: xr.Dataset) -> Iterator[_Group]:
    names = ("sd_ratio", "sd_ratio_se", "mean_error", "mean_error_se", "coverage", "coverage_se", "coverage_null_se")
    for prefix in ("", "shared_"):
        dim = f"{prefix}latent"
        if dim not in result.dims:
            continue
        sites = result[f"{prefix}site"].values
        for site in dict.fromkeys(sites.tolist()):
            part = result.isel({dim: np.flatnonzero(sites == site)})
            values = {name: np.atleast_2d(part[prefix + name].values) for name in names}
            yield _Group(site, part[dim].values.tolist(), values, "shared_latent" in result.dims)


def _limit(latents: list[int], local: int) -> float:
    """The simultaneous limit, in standard errors, for the statistics of sites with these numbers of latents.

    `local` is the number of local latents in all.
    """
    checks = sum(5 * (1 + (n if n > 1 else 0)) for n in latents) + (1 + local if local > 1 else 0)
    return limit(checks)


# The sd is judged on the log scale, where too narrow and too wide by the same factor are alike.
_MARGINS = {"sd": SD_MARGIN, "mean": MEAN_MARGIN, "coverage": COVERAGE_MARGIN, "correlation": CORRELATION_MARGIN}
COMPARED = tuple(_MARGINS)  # quantities that need the reference
_INTERNAL_MARGINS = _MARGINS | {"sd": float(np.log1p(SD_MARGIN))}


def _statistics(group: _Group, quantity: str, level: float, width: float) -> list[Statistic]:
    """All statistics of one quantity of one site, the most informative first."""
    error, se = _errors(group.values, quantity, level)
    margin, n = _INTERNAL_MARGINS[quantity], len(group.labels)
    mean, mean_se, square, noise = (_pooled(a, group.together) for a in (error, se, error**2 - se**2, se**2))
    columns = [(label, [i]) for i, label in enumerate(group.labels)] if n > 1 else []
    worst = f"the worst of {n} latents"
    each = [
        replace(_average(f"`{entry}`", f" ({worst})", mean[:, i], mean_se[:, i], margin, width), entry=entry)
        for entry, i in columns
    ]
    checks = [_average(f"`{group.site}`", "", mean, mean_se, margin, width), *_largest_first(each)]
    if quantity == "coverage":  # coverage is an average: it need not be right for single data
        return checks
    note = f" (root mean square, {worst})"
    each = [
        replace(_root(f"`{entry}`", note, square[:, i], noise[:, i], margin, width), entry=entry)
        for entry, i in columns
    ]
    over = "data and latents" if n > 1 else "data"
    square, noise = square.mean(1), noise.mean(1)
    whole = _root(f"`{group.site}`", f" (root mean square over {over})", square, noise, margin, width)
    return [*checks, whole, *_largest_first(each)]


def _pooled(values: Array, together: bool) -> Array:
    """Values `(data, …)`, averaged to one datum if all data err together, since their errors do not average out."""
    return values.mean(0, keepdims=True) if together and len(values) else values


def _errors(values: dict[str, Array], quantity: str, level: float) -> tuple[Array, Array]:
    if quantity == "sd":
        return np.log(values["sd_ratio"]), values["sd_ratio_se"] / values["sd_ratio"]
    if quantity == "mean":
        return values["mean_error"], values["mean_error_se"]
    # At a coverage near 1 hardly any draw is outside, and its own standard error is too small to judge `level` by.
    return values["coverage"] - level, np.maximum(values["coverage_se"], values["coverage_null_se"])


def _largest_first(checks: list[Statistic]) -> list[Statistic]:
    return sorted(checks, key=lambda check: -abs(check.effect))


def _average(label: str, note: str, error: Array, se: Array, margin: float, width: float) -> Statistic:
    """The average of errors `(data, latent)`."""
    if not error.size:
        return normal_statistic(label, note, np.nan, np.nan, margin, width)
    mean, spread = float(error.mean()), float(np.sqrt((se.mean(1) ** 2).sum())) / len(error)
    return normal_statistic(label, note, mean, spread, margin, width)


def _root(label: str, note: str, square: Array, noise: Array, margin: float, width: float) -> Statistic:
    """The root of a debiased mean square, averaged over data.

    A squared error with noise variance v has variance 2v² + 4 δ² v around a true error δ. For the interval δ is taken
    at the margin, which is the hypothesis to be rejected: at the observed δ the interval would be too short just where
    noise cancels an error. Its lower end respects that a sum of few squares is skewed like χ².

    Args:
        label: see `Statistic`.
        note: see `Statistic`.
        square: debiased squared errors, averaged over the latents of each datum.
        noise: the noise variance v that was subtracted.
        margin: root-mean-square error that passes.
        width: half width of the simultaneous intervals, in standard errors.
    """
    square, noise = square.reshape(-1), noise.reshape(-1)
    if not square.size:
        return Statistic(label, note, np.nan, np.nan, np.nan, np.nan, np.nan, margin, signed=False)

    def spread(true_square: float) -> float:
        return float(np.sqrt((2.0 * noise**2 + 4.0 * true_square * noise).sum())) / len(noise)

    mean, at_margin = float(square.mean()), spread(margin**2)
    # The effective number of independent data, given their noise variances.
    independent = max(1.0, float(noise.sum() ** 2 / max((noise**2).sum(), 1e-300)))
    lower = float((chdtri(independent, ndtr(-width)) - independent) / np.sqrt(2.0 * independent))
    # Errors may lie where the noise is large (a datum both hard and slow to mix): if larger, each datum's own counts.
    own = float(np.sqrt((2.0 * noise**2 + 4.0 * np.maximum(margin**2, square) * noise).sum())) / len(noise)
    scores = (mean - margin**2) / max(own, 1e-300)
    p_value = float(chdtrc(independent, max(0.0, independent + np.sqrt(2.0 * independent) * scores)))
    root = float(np.sqrt(max(mean, 0.0)))
    low = float(np.sqrt(max(mean - lower * at_margin, 0.0)))
    high = float(np.sqrt(max(mean, 0.0) + width * at_margin))
    error = float(np.sqrt(root**2 + spread(root**2))) - root
    return Statistic(label, note, root, error, low, high, p_value, margin, signed=False)


def _correlation_statistics(result: xr.Dataset, width: float) -> list[Statistic]:
    """The whole matrix, and every latent's row of it."""
    together = "shared_latent" in result.dims
    pairs = result.sizes["latent"] * (result.sizes["latent"] - 1) // 2
    note = f" (root mean square over {pairs} {'pair' if pairs == 1 else 'pairs'})"
    square, noise = (_pooled(result[f"correlation_{name}"].values, together) for name in ("mean_square", "noise"))
    whole = _root("all latents", note, square, noise, CORRELATION_MARGIN, width)
    squares, noises = (_pooled(result[f"correlation_row_{name}"].values, together) for name in ("mean_square", "noise"))
    note = f" (root mean square with the others, the worst of {result.sizes['latent']} latents)"
    rows = [
        replace(_root(f"`{entry}`", note, squares[:, i], noises[:, i], CORRELATION_MARGIN, width), entry=entry)
        for i, entry in enumerate(result["latent"].values.tolist())
    ]
    return [whole, *_largest_first(rows)]


def _verdict(question: Question, status: Status, decisive: Statistic) -> Verdict:
    """The verdict on a question, with its sentence."""
    if question.quantity not in _MARGINS:
        return unaided.verdict(question, status, decisive)
    effect, se = _natural(question.quantity, decisive)
    words = {"fail": _failure, "pass": _agreement, "cannot tell": _doubt}[status]
    sentence = words(question.site, question.quantity, decisive, question.level)
    return Verdict(
        question.site,
        question.quantity,
        status,
        effect,
        se,
        _MARGINS[question.quantity],
        sentence,
        direction=_direction(decisive) if question.quantity == "sd" else "",
        entry=decisive.entry,
    )


def _direction(of_sd: Statistic) -> Direction:
    if np.isnan(of_sd.effect):
        return ""
    if not of_sd.signed:
        return "off"
    return "too narrow" if of_sd.effect < 0 else "too wide"


def _natural(quantity: str, check: Statistic) -> tuple[float, float]:
    """Effect and standard error in the units of `Verdict`, which for the sd are ratios in place of logs."""
    if quantity != "sd":
        return check.effect, check.se
    return float(np.expm1(check.effect)), float(np.exp(check.effect) * check.se)


def _failure(site: str, quantity: str, check: Statistic, level: float) -> str:
    effect, se = _natural(quantity, check)
    if quantity == "sd":
        direction = _direction(check)
        return (
            f"{check.label}: {'sd off' if direction == 'off' else direction} by {percent(abs(effect), se)}{check.note}"
        )
    if quantity == "mean":
        return f"{check.label}: mean off by {number(effect, se)} sd{check.note}"
    if quantity == "coverage":
        return f"{check.label}: {level:.0%} intervals hold {percent(level + effect, se)}{check.note}"
    return f"{check.label}: correlations off by {number(effect, se)}{check.note}"


def _agreement(site: str, quantity: str, check: Statistic, level: float) -> str:
    if quantity == "sd":
        return f"`{site}`: sd agrees within {ceil(np.expm1(check.reach), 2):.0%}"
    if quantity == "mean":
        return f"`{site}`: mean agrees within {ceil(check.reach, 2):.2f} sd"
    if quantity == "coverage":
        points = ceil(100.0 * check.reach, 0)
        unit = "point" if points == 1 else "points"
        return f"`{site}`: {level:.0%} intervals hold {level:.0%} within {points:.0f} {unit}"
    return f"{site}: correlations agree within {ceil(check.reach, 2):.2f}{check.note}"


def _doubt(site: str, quantity: str, check: Statistic, level: float) -> str:
    wanted = {
        "sd": f"sd agrees within {SD_MARGIN:.0%}",
        "mean": f"mean agrees within {MEAN_MARGIN} sd",
        "coverage": f"coverage of {level:.0%} intervals agrees within {100 * COVERAGE_MARGIN:.0f} points",
        "correlation": f"correlations agree within {CORRELATION_MARGIN}",
    }[quantity]
    head = f"{check.label}: cannot tell whether the {wanted}"
    if not np.isfinite(check.effect):
        return f"{head}: no datum has a reference posterior"
    effect, se = _natural(quantity, check)
    found = percent(effect, se) if quantity in ("sd", "coverage") else number(effect, se)
    return f"{head}: off by {found}{check.note}"


def _withdrawn(verdict: Verdict, share: str) -> Verdict:
    return replace(verdict, status="cannot tell", sentence=f"{verdict.sentence} where both are known, but {share}")

"""Verdicts in plain language on a comparison: for each latent site, can its sd, mean and coverage be believed?

What is looked at, for each site:

- the signed error, averaged over data and latents (of the log sd ratio, the mean, the coverage);
- the debiased root-mean-square error over data and latents (log sd ratio, mean), because errors that differ in sign
  from datum to datum average to nothing;
- both again for every single latent, averaged over data only, because one wrong latent among many averages away too.

and the root-mean-square error of correlations, over all latents together and for every latent with all others. With m
such statistics in all, limits lie z = Φ⁻¹(1 − 1e-5 / (2m)) standard errors out: a perfect guide fails once in 100,000
comparisons at most, where the draws resolve the posterior's fourth moments (a LogNormal with σ beyond 1 is too heavy).

`pass` speaks of mean, sd, central coverage and linear correlation. A wrong shape with the right moments passes; look at
`wasserstein` beside `wasserstein_null` for that.

Errors are independent over data, since every datum has its own draws (with shared latents, whose draw moves all data
together, data are counted as fully correlated instead); over the latents of one datum they are not, since
a draw is shared by all of them. The latents of one datum are therefore counted as fully correlated: the standard error
of their average is the average of their standard errors, an upper bound for any correlation. This costs no `pass`,
because every single latent, whose error is as large, has to pass as well.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import numpy.typing as npt
import xarray as xr
from scipy.special import chdtri, ndtr, ndtri

Array = npt.NDArray[np.float64]
Status = Literal["pass", "fail", "cannot tell"]

FALSE_ALARM = 1e-5
SD_MARGIN = 0.1
MEAN_MARGIN = 0.1
COVERAGE_MARGIN = 0.03
CORRELATION_MARGIN = 0.1


@dataclass(frozen=True)
class Verdict:
    """What a comparison says about one quantity of one site.

    Attributes:
        site: latent site, or `all latents` for their correlations.
        quantity: "sd", "mean", "coverage" or "correlation".
        status: "pass" if the error lies inside the margin, "fail" if outside, both at the simultaneous level of the
            module's docstring; else "cannot tell".
        effect: the error that decided: sd ratio − 1, mean error in reference sd, coverage − level, or the
            root-mean-square of one of these; NaN without data.
        se: its standard error.
        margin: the largest error that passes.
        sentence: the verdict in words; "±" is one standard error.
    """

    site: str
    quantity: str
    status: Status
    effect: float
    se: float
    margin: float
    sentence: str


def verdicts(result: xr.Dataset) -> list[Verdict]:
    """Judge a comparison site by site.

    Margins: sd within 10% (a factor of 1.1 either way), mean within 0.1 reference sd, coverage within 3 points,
    correlations within 0.1. If `cannot_tell` says that too many data have no reference, no verdict is "pass".

    Args:
        result: as `compare` returns it.

    Returns:
        For each latent site "sd", "mean" and "coverage", shared sites last; then "correlation" over all latents, if
        there are two or more local ones.
    """
    groups = list(_groups(result))
    limit = _limit([len(group.labels) for group in groups], result.sizes["latent"])
    level = float(result.attrs["coverage_level"])
    found = []
    for group in groups:
        for quantity in ("sd", "mean", "coverage"):
            found.append(_judge(group.site, quantity, _checks(group, quantity, level, limit), level))
    if result.sizes["latent"] > 1:
        found.append(_judge("all latents", "correlation", _correlation_checks(result, limit), level))
    if not result.attrs["cannot_tell"]:
        return found
    share = f"{result.attrs['share_left_out']:.0%} of the data have no reference posterior"
    return [_withdrawn(verdict, share) if verdict.status == "pass" else verdict for verdict in found]


@dataclass(frozen=True)
class _Group:
    """The part of a comparison that belongs to one site; shared sites count as one datum."""

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
    """The simultaneous limit, in standard errors, of all checks of sites with so many latents, `local` local ones."""
    checks = sum(5 * (1 + (n if n > 1 else 0)) for n in latents) + (1 + local if local > 1 else 0)
    return float(-ndtri(FALSE_ALARM / (2 * checks)))


@dataclass(frozen=True)
class _Check:
    """One statistic: its estimate with standard error, and its simultaneous interval."""

    label: str  # the site or latent that the sentence names
    note: str  # what the sentence adds
    effect: float
    se: float
    low: float
    high: float
    signed: bool

    def status(self, margin: float) -> Status:
        """Comparisons with NaN (no data) are false: cannot tell."""
        if -margin < self.low and self.high < margin:
            return "pass"
        return "fail" if self.low > margin or self.high < -margin else "cannot tell"

    @property
    def reach(self) -> float:
        """The largest error in the interval, infinite where nothing is known."""
        reach = max(abs(self.low), abs(self.high))
        return reach if np.isfinite(reach) else np.inf


# The sd is judged on the log scale, where too narrow and too wide by the same factor are alike.
_MARGINS = {"sd": SD_MARGIN, "mean": MEAN_MARGIN, "coverage": COVERAGE_MARGIN, "correlation": CORRELATION_MARGIN}
_INTERNAL_MARGINS = _MARGINS | {"sd": float(np.log1p(SD_MARGIN))}


def _checks(group: _Group, quantity: str, level: float, limit: float) -> list[_Check]:
    """All checks of one quantity of one site, the most telling first."""
    error, se = _errors(group.values, quantity, level)
    margin, n = _INTERNAL_MARGINS[quantity], len(group.labels)
    mean, mean_se, square, noise = (_pooled(a, group.together) for a in (error, se, error**2 - se**2, se**2))
    columns = [(f"`{label}`", [i]) for i, label in enumerate(group.labels)] if n > 1 else []
    worst = f"the worst of {n} latents"
    each = [_average(label, f" ({worst})", mean[:, i], mean_se[:, i], limit) for label, i in columns]
    checks = [_average(f"`{group.site}`", "", mean, mean_se, limit), *_largest_first(each)]
    if quantity == "coverage":  # a statement about averages: it need not hold datum by datum
        return checks
    note = f" (root mean square, {worst})"
    each = [_root(label, note, square[:, i], noise[:, i], margin, limit) for label, i in columns]
    over = "data and latents" if n > 1 else "data"
    square, noise = square.mean(1), noise.mean(1)
    whole = _root(f"`{group.site}`", f" (root mean square over {over})", square, noise, margin, limit)
    return [*checks, whole, *_largest_first(each)]


def _pooled(values: Array, together: bool) -> Array:
    """Values `(data, …)` as one datum, their mean, where all data err together: their errors do not average out."""
    return values.mean(0, keepdims=True) if together and len(values) else values


def _errors(values: dict[str, Array], quantity: str, level: float) -> tuple[Array, Array]:
    if quantity == "sd":
        return np.log(values["sd_ratio"]), values["sd_ratio_se"] / values["sd_ratio"]
    if quantity == "mean":
        return values["mean_error"], values["mean_error_se"]
    # At a coverage near 1 hardly any draw is outside, and its own standard error is too small to judge `level` by.
    return values["coverage"] - level, np.maximum(values["coverage_se"], values["coverage_null_se"])


def _largest_first(checks: list[_Check]) -> list[_Check]:
    return sorted(checks, key=lambda check: -abs(check.effect))


def _average(label: str, note: str, error: Array, se: Array, limit: float) -> _Check:
    """The average of errors `(data, latent)`."""
    if not error.size:
        return _Check(label, note, np.nan, np.nan, np.nan, np.nan, signed=True)
    mean, spread = float(error.mean()), float(np.sqrt((se.mean(1) ** 2).sum())) / len(error)
    return _Check(label, note, mean, spread, mean - limit * spread, mean + limit * spread, signed=True)


def _root(label: str, note: str, square: Array, noise: Array, margin: float, limit: float) -> _Check:
    """The root of a debiased mean square, averaged over data.

    A squared error with noise variance v has variance 2v² + 4 δ² v around a true error δ. For the interval δ is taken
    at the margin, which is the hypothesis to be rejected: at the observed δ the interval would be too short just where
    noise cancels an error. Its lower end respects that a sum of few squares is skewed like χ².

    Args:
        label: see `_Check`.
        note: see `_Check`.
        square: debiased squared errors, averaged over the latents of each datum.
        noise: the noise variance v that was subtracted.
        margin: root-mean-square error that passes.
        limit: simultaneous limit in standard errors.
    """
    square, noise = square.reshape(-1), noise.reshape(-1)
    if not square.size:
        return _Check(label, note, np.nan, np.nan, np.nan, np.nan, signed=False)

    def spread(true_square: float) -> float:
        return float(np.sqrt((2.0 * noise**2 + 4.0 * true_square * noise).sum())) / len(noise)

    mean = float(square.mean())
    root = float(np.sqrt(max(mean, 0.0)))
    independent = max(1.0, float(noise.sum() ** 2 / max((noise**2).sum(), 1e-300)))  # data, as far as they weigh alike
    skewed = float((chdtri(independent, ndtr(-limit)) - independent) / np.sqrt(2.0 * independent))
    low, high = mean - skewed * spread(margin**2), mean + limit * spread(margin**2)
    low, high = float(np.sqrt(max(low, 0.0))), float(np.sqrt(max(high, 0.0)))
    return _Check(label, note, root, float(np.sqrt(root**2 + spread(root**2))) - root, low, high, signed=False)


def _correlation_checks(result: xr.Dataset, limit: float) -> list[_Check]:
    """The whole matrix, and every latent's row of it."""
    together = "shared_latent" in result.dims
    pairs = result.sizes["latent"] * (result.sizes["latent"] - 1) // 2
    note = f" (root mean square over {pairs} {'pair' if pairs == 1 else 'pairs'})"
    square, noise = (_pooled(result[f"correlation_{name}"].values, together) for name in ("mean_square", "noise"))
    whole = _root("all latents", note, square, noise, CORRELATION_MARGIN, limit)
    squares, noises = (_pooled(result[f"correlation_row_{name}"].values, together) for name in ("mean_square", "noise"))
    note = f" (root mean square with the others, the worst of {result.sizes['latent']} latents)"
    rows = [
        _root(f"`{label}`", note, squares[:, i], noises[:, i], CORRELATION_MARGIN, limit)
        for i, label in enumerate(result["latent"].values.tolist())
    ]
    return [whole, *_largest_first(rows)]


def _judge(site: str, quantity: str, checks: list[_Check], level: float) -> Verdict:
    """A site fails by any check, and passes by all of them."""
    margin = _INTERNAL_MARGINS[quantity]
    statuses = [check.status(margin) for check in checks]
    status: Status = "fail" if "fail" in statuses else "cannot tell" if "cannot tell" in statuses else "pass"
    widest = max(checks, key=lambda check: check.reach)
    decisive = checks[statuses.index("fail")] if status == "fail" else widest
    effect, se = _natural(quantity, decisive)
    sentence = {"fail": _failure, "pass": _agreement, "cannot tell": _doubt}[status](site, quantity, decisive, level)
    return Verdict(site, quantity, status, effect, se, _MARGINS[quantity], sentence)


def _natural(quantity: str, check: _Check) -> tuple[float, float]:
    """Effect and standard error in the units of `Verdict`: those of the sd come as logs."""
    if quantity != "sd":
        return check.effect, check.se
    return float(np.expm1(check.effect)), float(np.exp(check.effect) * check.se)


def _failure(site: str, quantity: str, check: _Check, level: float) -> str:
    effect, se = _natural(quantity, check)
    if quantity == "sd":
        error = ("too narrow" if effect < 0 else "too wide") if check.signed else "sd off"
        return f"{check.label}: {error} by {_percent(abs(effect), se)}{check.note}"
    if quantity == "mean":
        return f"{check.label}: mean off by {_number(effect, se)} sd{check.note}"
    if quantity == "coverage":
        return f"{check.label}: {level:.0%} intervals hold {_percent(level + effect, se)}{check.note}"
    return f"{check.label}: correlations off by {_number(effect, se)}{check.note}"


def _agreement(site: str, quantity: str, check: _Check, level: float) -> str:
    if quantity == "sd":
        return f"`{site}`: sd agrees within {_ceil(np.expm1(check.reach), 2):.0%}"
    if quantity == "mean":
        return f"`{site}`: mean agrees within {_ceil(check.reach, 2):.2f} sd"
    if quantity == "coverage":
        points = _ceil(100.0 * check.reach, 0)
        unit = "point" if points == 1 else "points"
        return f"`{site}`: {level:.0%} intervals hold {level:.0%} within {points:.0f} {unit}"
    return f"{site}: correlations agree within {_ceil(check.reach, 2):.2f}{check.note}"


def _doubt(site: str, quantity: str, check: _Check, level: float) -> str:
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
    found = _percent(effect, se) if quantity in ("sd", "coverage") else _number(effect, se)
    return f"{head}: off by {found}{check.note}"


def _withdrawn(verdict: Verdict, share: str) -> Verdict:
    return replace(verdict, status="cannot tell", sentence=f"{verdict.sentence} where both are known, but {share}")


def _number(value: float, se: float) -> str:
    """Both with as many digits as the standard error has one of, two to four."""
    digits = int(np.clip(-np.floor(np.log10(se)), 2, 4)) if se > 0 else 2
    return f"{value:.{digits}f} ± {se:.{digits}f}"


def _percent(value: float, se: float) -> str:
    """Both in percent with as many digits as the standard error has one of, up to two after the point."""
    digits = int(np.clip(-np.floor(np.log10(100.0 * se)), 0, 2)) if se > 0 else 0
    return f"{100.0 * value:.{digits}f}% ± {100.0 * se:.{digits}f}%"


def _ceil(value: float, digits: int) -> float:
    """Rounded up, so that a bound stays one."""
    return float(np.ceil(value * 10**digits) / 10**digits)

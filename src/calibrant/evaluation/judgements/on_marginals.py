"""Questions about single latents: sd, mean, coverage and shape of every site."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
import xarray as xr

from calibrant.evaluation.judgements.decisions import Question, Statistic, normal_statistic
from calibrant.evaluation.judgements.pooled import Limits, Together, average, missing_as_right, root, together_of
from calibrant.evaluation.statistics.heavy_tails import WIDTHS

Array = npt.NDArray[np.float64]

SD_MARGIN = 0.1
MEAN_MARGIN = 0.1
COVERAGE_MARGIN = 0.03
SHAPE_MARGIN = 0.04
_LOG_SD = float(np.log1p(SD_MARGIN))  # the sd is judged on the log scale, where factors either way are alike
_HEAVY_TAILS = "its tails are too heavy for a mean or an sd"
_ON_LOG_SCALE = "on the log scale, "
_QUANTITIES = ("sd", "mean", "coverage", "shape")


def questions(result: xr.Dataset, limits: Limits) -> list[Question]:
    """The questions about every site, shared sites last."""
    level = float(result.attrs["coverage_level"])
    return [
        Question(group.site, quantity, list(_statistics(group, quantity, level, limits)), level)
        for group in _groups(result)
        for quantity in _QUANTITIES
        if quantity != "shape" or group.shape is not None
    ]


@dataclass(frozen=True)
class _Group:
    """The part of a comparison that belongs to one site; a shared site is treated as one datum."""

    result: xr.Dataset
    site: str
    labels: list[str]
    values: dict[str, Array]  # `(data, latent)`
    heavy: npt.NDArray[np.bool_]  # `(latent,)`
    log_scale: npt.NDArray[np.bool_]
    shape: tuple[Array, Array] | None  # difference ± error, `(probability, latent)`
    is_shared: bool

    def of(self, name: str) -> Array:
        return self.values[name]

    def tails(self, entries: list[int]) -> str:
        """What the sentence adds about heavy tails."""
        if not self.heavy[entries].any():
            return ""
        return f"{_ON_LOG_SCALE}{_HEAVY_TAILS}" if self.log_scale[entries].any() else _HEAVY_TAILS

    def together(self, quantity: str, entries: list[int]) -> Together | None:
        if self.is_shared:
            return None
        return together_of(self.result, quantity, [self.labels[i] for i in entries])


def _groups(result: xr.Dataset) -> Iterator[_Group]:
    for prefix in ("", "shared_"):
        dim = f"{prefix}latent"
        if dim not in result.dims:
            continue
        sites = result[f"{prefix}site"].values
        for site in dict.fromkeys(sites.tolist()):
            part = result.isel({dim: np.flatnonzero(sites == site)})
            yield _group(result, part, site, prefix)


def _group(result: xr.Dataset, part: xr.Dataset, site: str, prefix: str) -> _Group:
    dim, latents = f"{prefix}latent", part.sizes[f"{prefix}latent"]
    names = [str(n).removeprefix(prefix) for n, v in part.data_vars.items() if v.dims in ((dim,), ("data", dim))]
    values = {name: np.atleast_2d(part[prefix + name].values) for name in names}
    shape, known = None, f"{prefix}shape_difference" in part
    if known:
        shape = part[f"{prefix}shape_difference"].values, part[f"{prefix}shape_difference_se"].values
    none = np.zeros(latents, dtype=bool)
    heavy = part[f"{prefix}heavy"].values.astype(bool) if f"{prefix}heavy" in part else none
    log_scale = part[f"{prefix}log_scale"].values.astype(bool) if f"{prefix}log_scale" in part else none
    labels = part[dim].values.tolist()
    return _Group(result, site, labels, values, heavy, log_scale, shape, bool(prefix))


def _statistics(group: _Group, quantity: str, level: float, limits: Limits) -> Iterator[Statistic]:
    """All statistics of one quantity of one site, the most informative first."""
    if quantity == "shape":
        yield from _shapes(group, limits)
        return
    margin = {"sd": _LOG_SD, "mean": MEAN_MARGIN, "coverage": COVERAGE_MARGIN}[quantity]
    error, se = _errors(group, quantity, level)
    yield from _pooled(group, quantity, error, se, margin, limits, list(range(len(group.labels))))
    if quantity == "sd" and group.heavy.any():
        some = np.flatnonzero(group.heavy).tolist()
        ratio, ratio_se = (group.of(f"width_{WIDTHS[1]}_ratio{end}") for end in ("", "_se"))
        yield from _pooled(group, "width", np.log(ratio), ratio_se / ratio, margin, limits, some)


def _pooled(
    group: _Group, quantity: str, error: Array, se: Array, margin: float, limits: Limits, entries: list[int]
) -> Iterator[Statistic]:
    """Average and root mean square of the entries together, then of each by itself, the largest first."""

    def of(some: list[int], whole: bool, squared: bool) -> Statistic:
        label, note, entry = _names(group, some, whole)
        together, own, noise = group.together(quantity, some), error[:, some], se[:, some]
        if squared:
            note = f", root mean square over {'data and latents' if whole and len(some) > 1 else 'data'}{note}"
            found = root(label, note, own**2 - noise**2, noise**2, margin, limits, together)
        else:
            found = average(label, note, own, noise, margin, limits, together)
        return replace(found, entry=entry, tails=group.tails(some))

    # Coverage is an average, which need not be right for single data; shared latents are one datum.
    for squared in (False,) if quantity == "coverage" or group.is_shared else (False, True):
        yield of(entries, True, squared)
        if len(group.labels) > 1:
            yield from _largest_first([of([entry], False, squared) for entry in entries])


def _names(group: _Group, entries: list[int], whole: bool) -> tuple[str, str, str]:
    """Label, note and entry of a statistic of some entries."""
    count = len(group.labels)
    if whole or count == 1:
        return f"`{group.site}`", "", ""
    entry = group.labels[entries[0]]
    return f"`{entry}`", f", the worst of {count} latents", entry


def _errors(group: _Group, quantity: str, level: float) -> tuple[Array, Array]:
    """Errors and standard errors `(data, latent)`; those of quantiles for latents with heavy tails."""
    if quantity == "coverage":
        # At a coverage near 1 hardly any draw is outside, and its own standard error is too small to judge `level` by.
        return group.of("coverage") - level, np.maximum(group.of("coverage_se"), group.of("coverage_null_se"))
    if quantity == "mean":
        error, se = group.of("mean_error"), group.of("mean_error_se")
        if group.heavy.any():
            error = np.where(group.heavy, group.of("median_error"), error)
            se = np.where(group.heavy, group.of("median_error_se"), se)
        return error, se
    ratio, se = group.of("sd_ratio"), group.of("sd_ratio_se")
    if group.heavy.any():
        ratio = np.where(group.heavy, group.of(f"width_{WIDTHS[0]}_ratio"), ratio)
        se = np.where(group.heavy, group.of(f"width_{WIDTHS[0]}_ratio_se"), se)
    return np.log(ratio), se / ratio


def _largest_first(checks: list[Statistic]) -> list[Statistic]:
    return sorted(checks, key=lambda check: -abs(check.effect))


def _shapes(group: _Group, limits: Limits) -> Iterator[Statistic]:
    """The largest differences of the distribution functions first; every probability of every latent counts."""
    assert group.shape is not None
    probabilities = group.result["probability"].values
    found = []
    for place, p in enumerate(probabilities.tolist()):
        for i, label in enumerate(group.labels):
            difference, se = (float(part[place, i]) for part in group.shape)
            one = normal_statistic(f"`{label}`", f"{p:.2f}", difference, se, SHAPE_MARGIN)
            one = one if group.is_shared else missing_as_right(one, limits)
            found.append(replace(one, entry=label if len(group.labels) > 1 else ""))
    yield from _largest_first(found)

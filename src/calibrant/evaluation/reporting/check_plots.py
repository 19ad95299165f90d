"""Pictures of a check: simulation-based calibration, importance weights, classifier test, pairs.

A function returns None if its picture can't be made.
"""

from __future__ import annotations

from collections.abc import Hashable
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import xarray as xr
from scipy.special import ndtri

from calibrant.evaluation.reporting.ecdf_bands import LEVEL, STEPS, ecdf_band
from calibrant.evaluation.reporting.run_plots import scalar_draws, scores, typical_datum
from calibrant.evaluation.reporting.style import (
    COLOURS,
    GUIDE,
    INK,
    LINES,
    MARKERS,
    REFERENCE,
    REFERENCE_FILL,
    WIDTH,
    cycled,
    new_figure,
    plain_axes,
)
from calibrant.evaluation.results import RunResult
from calibrant.evaluation.statistics.simulation_ranks import DENSITIES, uniformity
from calibrant.inference.reweighting import reliable
from calibrant.inference.trees import SAMPLE, scalars

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Array = npt.NDArray[np.float64]

_FUNCTIONS = (*DENSITIES, "tarp")
_ACROSS = 3
_ERRORS = 2.0  # half width of error bars and of the classifier's band, in standard errors


def _ecdf(values: Array) -> Array:
    """The empirical distribution function of values, on the grid."""
    return np.searchsorted(np.sort(values), np.arange(1, STEPS) / STEPS, side="right") / len(values)


# -- calibration by simulation -----------------------------------------------------------------------------------------


def calibration_bands(result: RunResult, most: int = 9) -> Figure | None:
    """Distribution functions of the PIT minus the uniform one: functions of the latents, then the worst latents.

    The band holds all quantities of a calibration together, including those that are not shown.
    """
    if result.calibration is None:
        return None
    found = uniformity(result.calibration)
    values, band = pit_columns(result.calibration), joint_band(found)
    u, shown = np.arange(1, STEPS) / STEPS, _quantities(found, most)
    rows, across = -(-len(shown) // _ACROSS), min(_ACROSS, len(shown))
    with new_figure(WIDTH, 1.75 * rows + 0.3) as figure:
        grid = figure.subplots(rows, across, sharex=True, sharey=True, squeeze=False)
        for axes, name in zip(grid.ravel(), shown, strict=False):
            _difference(axes, plain_axes(name), u, _ecdf(values[name]) - u, (band[0] - u, band[1] - u))
        for axes in grid.ravel()[len(shown) :]:
            axes.set_axis_off()
        for axes in grid[:, 0]:
            axes.set_ylabel("F(u) − u")
        for axes in grid.ravel()[max(0, len(shown) - across) : len(shown)]:
            axes.set_xlabel("u")
            axes.tick_params(labelbottom=True)
        return figure


def _difference(axes: Axes, name: str, x: Array, y: Array, band: tuple[Array, Array]) -> None:
    """Draw a curve with its band; a curve that leaves its band has another colour and a label that says so."""
    outside = bool(((y < band[0] - 1e-9) | (y > band[1] + 1e-9)).any())
    axes.fill_between(x, *band, color=REFERENCE_FILL, alpha=0.6, lw=0)
    axes.axhline(0.0, color=INK, lw=0.8, ls="--")
    axes.plot(x, y, color=COLOURS[1] if outside else COLOURS[0], lw=1.8)
    axes.set_title(f"{name}: outside" if outside else name, color=COLOURS[1] if outside else INK)


def joint_band(found: xr.Dataset) -> tuple[Array, Array]:
    """The band that holds all quantities of a calibration in 95% of the checks of an exact guide (Bonferroni)."""
    return ecdf_band(int(found.attrs["simulations"]), 1.0 - (1.0 - LEVEL) / found.sizes["quantity"])


def pit_columns(tree: xr.DataTree) -> dict[str, Array]:
    """PIT values of every quantity of a calibration, by the labels of `uniformity`."""
    group, columns = tree["prior_sbc"].dataset, dict[str, Array]()
    for name in map(str, group.data_vars):
        array = group[name].transpose(*SAMPLE, ...).values.astype(np.float64)
        flat = array.reshape(array.shape[0] * array.shape[1], -1)
        columns |= dict(zip((latent.label for latent in scalars(group, [name])), flat.T, strict=True))
    return columns


def _quantities(found: xr.Dataset, most: int) -> list[str]:
    """The quantities to show: functions of the latents (a third of them the user's), then the worst latents."""
    labels = found["quantity"].values.tolist()
    always = [name for name in ("log_joint", "log_likelihood", "hpd", "tarp") if name in labels]
    after = labels[labels.index(always[-1]) + 1 :][: most // 3] if always else []
    rest = found["ecdf_difference"].drop_sel(quantity=[n for n in labels if n in always or n in after])
    worst = rest.sortby(rest, ascending=False)["quantity"].values.tolist()
    return [*always, *after, *worst][:most]


def coverage_curves(result: RunResult) -> Figure | None:
    """Coverage of highest-density regions and of central intervals of the latents over their nominal level."""
    if result.calibration is None:
        return None
    columns, found = pit_columns(result.calibration), uniformity(result.calibration)
    latents = found["quantity"].values[_is_latent(found)].tolist()
    level, band = np.arange(1, STEPS) / STEPS, ecdf_band(int(found.attrs["simulations"]))
    curves = {"highest-density region, all latents": 1.0 - _ecdf(columns["hpd"])[::-1]}
    central = np.array([_ecdf(np.abs(2.0 * columns[name] - 1.0)) for name in latents])
    if len(latents):
        curves["central interval, mean over latents"] = central.mean(0)
    if (pooled := _reference_coverage(result)) is not None:
        curves["central interval, reference of the checked data"] = pooled
    with new_figure(WIDTH, 3.9) as figure:
        left, right = figure.subplots(1, 2)
        left.fill_between(level, *band, color=REFERENCE_FILL, alpha=0.6, lw=0)
        right.fill_between(level, *(100 * (end - level) for end in band), color=REFERENCE_FILL, alpha=0.6, lw=0)
        left.plot([0, 1], [0, 1], color=INK, lw=0.8, ls="--")
        right.axhline(0.0, color=INK, lw=0.8, ls="--")
        for curve in central if len(latents) > 1 else ():
            right.plot(level, 100 * (curve - level), color=COLOURS[1], lw=0.6, alpha=0.35)
        for i, (name, curve) in enumerate(curves.items()):
            style: dict[str, Any] = {"color": (*COLOURS[:2], REFERENCE)[i], "ls": LINES[i], "lw": 2.0}
            left.plot(level, curve, label=name, **style)
            right.plot(level, 100 * (curve - level), **style)
        left.set(xlabel="level", ylabel="coverage", xlim=(0, 1), ylim=(0, 1), aspect="equal")
        right.set(xlabel="level", ylabel="coverage less level (points)", xlim=(0, 1))
        figure.legend(loc="outside upper center", ncols=1)
        return figure


def _is_latent(found: xr.Dataset) -> npt.NDArray[np.bool_]:
    """Which quantities are latents; they come before the functions of the latents."""
    sites = found["site"].values.tolist()
    first = min(sites.index(name) for name in _FUNCTIONS if name in sites)
    return np.arange(len(sites)) < first


def _reference_coverage(result: RunResult, most: int = 64) -> Array | None:
    """The share of reference draws in central intervals of the guide, over the checked data and local latents."""
    comparison = result.comparison
    if comparison is None or result.reference is None or not comparison.sizes["data"] or not comparison.sizes["latent"]:
        return None
    labels, inside = comparison["data"].values[:most], np.zeros(STEPS)
    for site in dict.fromkeys(comparison["site"].values.tolist()):
        for ours, theirs in zip(*(_flat(t, site, labels) for t in (result.amortized, result.reference)), strict=True):
            rank = np.searchsorted(np.sort(ours), theirs[:: max(1, len(theirs) // _REFERENCE_DRAWS)]) / len(ours)
            # The smallest central interval of the guide that holds the draw, in steps of the grid.
            smallest = np.ceil(STEPS * np.abs(2.0 * rank - 1.0)).clip(1, STEPS)
            inside += np.bincount(smallest.astype(int) - 1, minlength=STEPS) / len(rank)
    return inside.cumsum()[:-1] / inside.sum()


_REFERENCE_DRAWS = 500


def _flat(tree: xr.DataTree, site: str, labels: npt.NDArray[Any]) -> Array:
    """The draws of a site's entries for some data, `(data · entries, draws)`."""
    draws = tree["posterior"][site].sel(data=labels).transpose(*SAMPLE, "data", ...).values.astype(np.float64)
    return draws.reshape(draws.shape[0] * draws.shape[1], -1).T


def recovery(result: RunResult, named: int = 3) -> Figure | None:
    """Size of the z-scores of simulated latents against the contraction of their posterior, one point per latent.

    Both are medians over the simulations. The median of |z| is in units of that of a standard Normal; the bar is a 95%
    interval, by order statistics. z-scores beyond a factor of 20, and contractions below −1, are drawn at the edge.
    """
    if result.calibration is None or "z_score" not in (found := result.calibration["recovery"].dataset):
        return None
    from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

    size, contraction = _typical_z(found), _typical_contraction(found)
    sites = found["site"].values
    with new_figure(WIDTH, 3.2) as figure:
        axes = figure.subplots()
        for i, site in enumerate(dict.fromkeys(sites.tolist())):
            low, middle, high = size[:, sites == site]
            bars = np.stack([middle - low, high - middle])
            style: dict[str, Any] = {"fmt": cycled(MARKERS, i), "color": cycled(COLOURS, i), "ms": 6, "mfc": "white"}
            axes.errorbar(
                contraction[sites == site], middle, bars, mew=1.5, elinewidth=1.0, label=plain_axes(site), **style
            )
        for i in _named(size[1], contraction, named):
            label, at = plain_axes(found["latent"].values[i]), (contraction[i], size[1, i])
            axes.annotate(label, at, (7, 3), textcoords="offset points", fontsize=10)
        axes.axhline(1.0, color=INK, lw=0.8, ls="--")
        edges = min(0.5, float(size.min()) / 1.2), max(2.0, 1.2 * float(size.max()))
        axes.set(yscale="log", ylim=edges, xlim=(min(-0.05, float(contraction.min()) - 0.05), 1.1))
        axes.set(xlabel="contraction: 1 − variance / prior variance", ylabel="size of z-scores\n(1 is right)")
        axes.yaxis.set_major_locator(FixedLocator([0.1, 0.25, 0.5, 1.0, 2.0, 4.0, 10.0]))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.yaxis.set_minor_locator(NullLocator())
        if len(set(sites.tolist())) > 1:
            figure.legend(loc="outside upper center", ncols=6)
        return figure


_LARGEST = 20.0


def _named(size: Array, contraction: Array, most: int) -> list[int]:
    """The latents with the z-scores furthest from 1, without those whose names would overlap."""
    found: list[int] = []
    for i in np.argsort(-np.abs(np.log(size)), kind="stable").tolist():
        near = [j for j in found if abs(contraction[i] - contraction[j]) < 0.1 and abs(np.log(size[i] / size[j])) < 0.4]
        found += [] if near or len(found) == most else [i]
    return found


def _typical_z(found: xr.Dataset) -> Array:
    """The median of |z| with the ends of its interval, `(3, latent)`, in units of that of a standard Normal."""
    z = np.nan_to_num(found["z_score"].transpose("draw", "latent").values, posinf=1e6, neginf=-1e6)
    z = np.sort(np.abs(z), axis=0)
    count = len(z)
    ranks = np.array([count / 2 - np.sqrt(count), count / 2, count / 2 + np.sqrt(count)]).astype(int)
    return np.clip(z[ranks.clip(0, count - 1)] / ndtri(0.75), 1 / _LARGEST, _LARGEST)


def _typical_contraction(found: xr.Dataset) -> Array:
    return np.clip(np.nan_to_num(found["contraction"].median("draw").values), -1.0, 1.0)


# -- importance weights and the classifier test ------------------------------------------------------------------------


def importance(result: RunResult) -> Figure | None:
    """k-hat of every datum, and the gap estimated from the guide's own draws, both sorted."""
    if result.weights is None or not result.weights.sizes["data"]:
        return None
    good = float(result.weights.attrs["good_k"])
    with new_figure(WIDTH, 3.0) as figure:
        left, right = figure.subplots(1, 2)
        _sorted_khat(left, result.weights["pareto_k"].values, good, reliable(result.weights))
        _sorted_gap(right, result.weights["gap"].values, result.weights["gap_se"].values)
        return figure


def _sorted_khat(axes: Axes, khat: Array, good: float, relied: npt.NDArray[np.bool_]) -> None:
    """Draw sorted values of k-hat; those that are not finite are triangles at the edge that point outwards."""
    order = np.argsort(khat, kind="stable")
    khat, relied = khat[order], relied[order]
    finite = khat[np.isfinite(khat)]
    low = min(0.0, float(finite.min(initial=np.inf)))
    high = max(1.1, float(finite.max(initial=-np.inf)))
    low, high = low - 0.08 * (high - low), high + 0.08 * (high - low)
    rank, at = np.arange(1, len(khat) + 1), np.clip(np.nan_to_num(khat, nan=high), low, high)
    parts = {"o": np.isfinite(khat), "v": np.isneginf(khat), "^": np.isposinf(khat) | np.isnan(khat)}
    for marker, of in parts.items():
        for is_relied, colour in ((True, COLOURS[0]), (False, COLOURS[1])):
            chosen = of & (relied == is_relied)
            axes.plot(rank[chosen], at[chosen], marker, ms=4, color=colour, clip_on=False)
    axes.axhline(good, color=INK, lw=1.0, ls="--")
    axes.set(xlabel="datum, by k-hat", ylabel=f"k-hat (good up to {good:.2f})", ylim=(low, high))


def _sorted_gap(axes: Axes, gap: Array, error: Array) -> None:
    known = np.isfinite(gap)
    order = np.argsort(gap[known], kind="stable")
    values, bars = gap[known][order], _ERRORS * np.nan_to_num(error[known][order])
    rank = np.arange(1, len(values) + 1)
    axes.errorbar(rank, values, bars, fmt="o", ms=4, color=COLOURS[0], elinewidth=0.8)
    axes.axhline(0.0, color=INK, lw=0.8, ls="--")
    axes.set(xlabel="datum, by gap", ylabel="log evidence − ELBO (nats)")
    if not known.all():
        axes.annotate(f"{int((~known).sum())} infinite", (0.03, 0.93), xycoords="axes fraction")


def classifier(result: RunResult) -> Figure | None:
    """Sorted accuracies of the classifier that tells guide from reference, with the accuracy that chance gives."""
    comparison = result.comparison
    if comparison is None or "c2st" not in comparison or not np.isfinite(comparison["c2st"].values).any():
        return None
    found = comparison[["c2st", "c2st_null", "c2st_null_sd", "c2st_flagged"]].dropna("data", subset=["c2st"])
    found = found.sortby("c2st")
    rank, accuracy, flagged = np.arange(1, found.sizes["data"] + 1), found["c2st"].values, found["c2st_flagged"].values
    flagged = flagged.astype(bool)
    null, sd = found["c2st_null"].values, _ERRORS * found["c2st_null_sd"].values
    with new_figure(WIDTH, 2.8) as figure:
        axes = figure.subplots()
        axes.vlines(rank, null - sd, null + sd, color=REFERENCE_FILL, lw=max(1.0, min(6.0, 380 / len(rank))))
        axes.plot([], [], color=REFERENCE_FILL, lw=6, label="what chance gives")
        axes.plot(rank[~flagged], accuracy[~flagged], "o", ms=5, mfc="white", mew=1.4, color=COLOURS[0], label="datum")
        axes.plot(rank[flagged], accuracy[flagged], "D", ms=5, color=COLOURS[1], label="datum, flagged")
        axes.set(xlabel="datum, by accuracy", ylabel="accuracy", ylim=(min(0.4, *accuracy, *(null - sd)) - 0.02, 1.02))
        figure.legend(loc="outside upper center", ncols=3)
        return figure


# -- pairs of latents --------------------------------------------------------------------------------------------------


def pairs(result: RunResult, most: int = 1000) -> Figure | None:
    """Two pairs of latents for the worst and for a typical datum, draws of the guide over draws of the reference.

    The pairs are the one with the largest error of its correlation, and the two latents with the largest errors.
    """
    comparison = result.comparison
    if comparison is None or result.reference is None or not comparison.sizes["data"]:
        return None
    if comparison.sizes["latent"] < 2:
        return None
    largest = scores(comparison).max("latent")
    worst = largest.sortby(largest, ascending=False)["data"].values[0].item()
    rows = list({typical_datum(comparison): "typical", worst: "worst"}.items())[::-1]
    with new_figure(WIDTH, 3.1 * len(rows) + 0.3) as figure:
        grid = figure.subplots(len(rows), 2, squeeze=False)
        for (label, kind), axes in zip(rows, grid, strict=True):
            trees = (result.amortized, result.reference)
            ours, theirs = (scalar_draws(t, label, comparison["latent"].values.tolist()) for t in trees)
            for one, (chosen, why) in zip(axes, _chosen_pairs(comparison, label, ours, theirs), strict=True):
                _pair(one, theirs[chosen], ours[chosen], most)
                one.set(xlabel=plain_axes(chosen[0]), ylabel=plain_axes(chosen[1]))
                one.set_title(f"{kind} datum ({plain_axes(label)}): {why}")
        figure.legend(*grid[0, 0].get_legend_handles_labels(), loc="outside upper center", ncols=2, markerscale=3)
        return figure


def _chosen_pairs(
    comparison: xr.Dataset, label: Hashable, ours: xr.Dataset, theirs: xr.Dataset
) -> list[tuple[list[str], str]]:
    names = [str(name) for name in ours.data_vars]
    with np.errstate(divide="ignore", invalid="ignore"):
        a, b = (np.corrcoef([side[name].values.ravel() for name in names]) for side in (ours, theirs))
    wrong = np.triu(np.nan_to_num(np.abs(a - b)), 1)
    i, j = np.unravel_index(int(wrong.argmax()), wrong.shape)
    error = scores(comparison).sel(data=label)
    largest = error.sortby(error, ascending=False)["latent"].values[:2].tolist()
    return [([names[i], names[j]], "worst correlation"), (largest, "largest errors")]


def _pair(axes: Axes, theirs: xr.Dataset, ours: xr.Dataset, most: int) -> None:
    """Draw two latents, the guide's draws over those of the reference."""
    both = []
    for side, colour, label, alpha in ((theirs, "#777777", "reference", 0.5), (ours, GUIDE, "guide", 0.35)):
        draws = np.stack([values.values.ravel() for values in side.data_vars.values()])
        thin = np.linspace(0, draws.shape[1] - 1, min(most, draws.shape[1])).astype(int)
        axes.plot(*draws[:, thin], ".", ms=3.5, mew=0, color=colour, alpha=alpha, label=label, rasterized=True)
        both.append(draws)
    low, high = np.quantile(np.concatenate(both, 1), [0.001, 0.999], axis=1)
    edge = 0.05 * np.maximum(high - low, 1e-12)
    axes.set(xlim=(low[0] - edge[0], high[0] + edge[0]), ylim=(low[1] - edge[1], high[1] + edge[1]))

"""Pictures of a run: training curves, contrast curves, agreement with the reference, gaps, ArviZ's plots."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import xarray as xr

from calibrant.evaluation.reporting.contrast_plots import contrast_figure
from calibrant.evaluation.reporting.ecdf_bands import ecdf_band
from calibrant.evaluation.reporting.style import (
    COLOURS,
    INK,
    STYLE,
    WIDTH,
    cycled,
    new_figure,
    plain_axes,
)
from calibrant.evaluation.results import RunResult
from calibrant.evaluation.statistics.ranks import pit
from calibrant.inference.fitting.curves import training_figure
from calibrant.inference.trees import latent_names, scalars

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
Array = npt.NDArray[np.float64]


def training_curves(results: Sequence[RunResult]) -> Figure | None:
    """ELBO of training and held-out data over epochs, without its steep start; below it the noise scales."""
    trained = [(i, r) for i, r in enumerate(results) if len(r.history) > 1]
    return training_figure([(r.name, cycled(COLOURS, i), r.history) for i, r in trained]) if trained else None


def contrast_curves(results: Sequence[RunResult]) -> Figure | None:
    """The contrast experiment of all models."""
    shown = {result.name: result.contrast for result in results if result.contrast is not None}
    return contrast_figure(shown) if shown else None


def agreement(result: RunResult, sites: int = 4) -> Figure | None:
    """For every site: posterior means of the guide against those of the reference, and the ratios of their sds."""
    if result.comparison is None or result.reference is None or not result.comparison.sizes["data"]:
        return None
    comparison = result.comparison
    names = list(dict.fromkeys(comparison["site"].values.tolist()))[:sites]
    if not names:
        return None
    with new_figure(WIDTH, 3.1 * len(names)) as figure:
        for (left, right), name in zip(figure.subplots(len(names), 2, squeeze=False), names, strict=True):
            part = comparison.isel(latent=np.flatnonzero(comparison["site"].values == name))
            _means(left, result, name, comparison["data"].values)
            _ratios(right, part["sd_ratio"].values.ravel(), name)
        return figure


def _means(axes: Axes, result: RunResult, name: str, labels: np.ndarray) -> None:
    assert result.reference is not None
    theirs, ours = (
        tree["posterior"][name].sel(data=labels).mean(("chain", "draw")).transpose("data", ...).values.ravel()
        for tree in (result.reference, result.amortized)
    )
    axes.plot(theirs, ours, ".", ms=3, alpha=min(1.0, max(0.15, 500 / len(ours))), color=COLOURS[0], rasterized=True)
    ends = [min(theirs.min(), ours.min()), max(theirs.max(), ours.max())]
    axes.plot(ends, ends, color=INK, lw=1.0, ls="--")
    axes.set(xlabel=f"reference mean of {plain_axes(name)}", ylabel=f"guide's mean of {plain_axes(name)}")


def _ratios(axes: Axes, ratio: Array, name: str) -> None:
    ratio = np.clip(ratio, 0.05, 20.0)
    low, high = min(0.5, float(ratio.min())), max(2.0, float(ratio.max()))
    bins = np.geomspace(low, high, int(np.clip(2 * len(ratio) ** 0.5, 10, 50))).tolist()
    axes.hist(ratio, bins, histtype="stepfilled", color=COLOURS[0])
    axes.axvline(1.0, color=INK, lw=1.0, ls="--")
    axes.set_xscale("log")
    ticks = [t for t in (0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 20.0) if low <= t <= high]
    axes.set_xticks(ticks, [f"{t:g}" for t in ticks], minor=False)
    axes.minorticks_off()
    axes.set(xlabel=f"sd of guide / sd of reference, {plain_axes(name)}", ylabel="number of data × latents")


def gaps(result: RunResult) -> Figure | None:
    """Stacked bars of both parts of the gap of every datum, the largest first."""
    split = known_gaps(result)
    if split is None:
        return None
    split = split.sortby("gap", ascending=False)
    rank, lower, upper = (np.arange(split.sizes["data"]), *(split[n].values for n in ("approximation", "amortization")))
    with new_figure(WIDTH, 2.5) as figure:
        axes = figure.subplots()
        axes.bar(rank, lower, 1.0, color=COLOURS[0], label="approximation")
        axes.bar(rank, upper, 1.0, lower, color=COLOURS[4], label="amortization")
        axes.set(xlabel="datum, by gap", ylabel="nats", xlim=(-0.5, len(rank) - 0.5))
        axes.set_xticks([])
        figure.legend(loc="outside upper center", ncols=2)
        return figure


def known_gaps(result: RunResult) -> xr.Dataset | None:
    """The gaps of the data for which they are known; None if there are none."""
    if result.gap is None:
        return None
    known = result.gap.isel(data=np.flatnonzero(np.isfinite(result.gap["gap"] + result.gap["approximation"])))
    return known if known.sizes["data"] else None


def scores(comparison: xr.Dataset) -> xr.DataArray:
    """The error of the guide, `(data, latent)`: the larger of |mean error| (in reference sd) and |log sd ratio|."""
    error, ratio = abs(comparison["mean_error"]), abs(np.log(comparison["sd_ratio"].clip(1e-12)))
    return error.where(error > ratio, ratio)


def scalar_draws(tree: xr.DataTree, label: Hashable, latents: Sequence[str]) -> xr.Dataset:
    """Draws of single latents (`scale`, `z[3]`, `z[1,2]`) of one datum, each a variable `(chain, draw)`."""
    posterior = tree["posterior"].dataset
    local = [name for name in latent_names(posterior) if "data" in posterior[name].dims]
    known = {latent.label: latent for latent in scalars(posterior, local)}  # a site may have brackets in its name
    found = {}
    for name in latents:
        draws = posterior[known[name].site].sel(data=label).transpose("chain", "draw", ...)
        position: tuple[Any, ...] = (slice(None), slice(None), *known[name].index)
        found[name] = (("chain", "draw"), draws.values[position].astype(np.float64))
    return xr.Dataset(found, coords={"chain": posterior["chain"].values, "draw": posterior["draw"].values})


def typical_datum(comparison: xr.Dataset) -> Hashable:
    """The datum whose largest error is the median over the data."""
    largest = scores(comparison).max("latent")
    return largest.sortby(largest)["data"].values[(largest.sizes["data"] - 1) // 2].item()


ARVIZ = ("dist", "forest", "trace", "ecdf_pit")


def arviz_pictures(result: RunResult, names: Sequence[str] = ARVIZ, latents: int = 6) -> dict[str, Figure]:
    """ArviZ's own plots: `dist`, `forest` and `trace` of a typical datum, `ecdf_pit` over all data.

    The latents with the largest errors over all data are shown.
    """
    comparison = result.comparison
    if comparison is None or result.reference is None or not comparison.sizes["data"] or not comparison.sizes["latent"]:
        return {}
    import arviz_plots

    average = scores(comparison).mean("data")
    chosen = average.sortby(average, ascending=False)["latent"].values[:latents].tolist()
    label = typical_datum(comparison)
    ours, theirs = (scalar_draws(tree, label, chosen) for tree in (result.amortized, result.reference))
    both = {"reference": _one_chain(theirs, ours), "guide": _one_chain(ours, theirs)}
    trees = {name: xr.DataTree.from_dict({"/posterior": draws}) for name, draws in both.items()}
    rows = -(-len(chosen) // _ACROSS)
    grid: dict[str, Any] = {"col_wrap": _ACROSS, "figure_kwargs": _size(2.0 * rows + 0.4)}
    bare = {"point_estimate_text": False}
    reference = xr.DataTree.from_dict({"/posterior": theirs})
    tall, thin = {"figure_kwargs": _size(0.6 * len(chosen) + 1.2)}, {"trace": {"alpha": 0.6, "width": 0.6}}

    def values() -> xr.DataTree:
        return xr.DataTree.from_dict({"/pit": _pit_values(result, chosen)})

    drawn = {
        "dist": lambda: _arviz(arviz_plots.plot_dist, trees, "model", visuals=bare, **grid),
        "forest": lambda: _arviz(arviz_plots.plot_forest, trees, "model", **tall),
        "trace": lambda: _arviz(arviz_plots.plot_trace, reference, visuals=thin, **grid),
        "ecdf_pit": lambda: _arviz(_pit_curves, values(), **grid),
    }
    return {name: drawn[name]() for name in names}


_ACROSS = 3
_PIT_LEVEL = 0.99  # as ArviZ has it


def _size(height: float) -> dict[str, Any]:
    return {"figsize": (WIDTH, height), "figsize_units": "inches", "layout": "constrained"}


def _one_chain(draws: xr.Dataset, other: xr.Dataset) -> xr.Dataset:
    """Evenly spaced draws, as many as both sides have, as one chain: ArviZ overlays trees of the same shape."""
    count = min(side.sizes["chain"] * side.sizes["draw"] for side in (draws, other))
    flat = {name: value.values.ravel() for name, value in draws.data_vars.items()}
    thin = np.linspace(0, draws.sizes["chain"] * draws.sizes["draw"] - 1, count).astype(int)
    found = {name: (("chain", "draw"), values[thin][None]) for name, values in flat.items()}
    return xr.Dataset(found, coords={"chain": [0], "draw": np.arange(count)})


def _pit_values(result: RunResult, latents: Sequence[str], total: int = 2000) -> xr.Dataset:
    """PIT values of single latents over all data, about `total` of them, as one chain."""
    assert result.reference is not None
    assert result.comparison is not None
    each = max(1, total // result.comparison.sizes["data"])
    available = min(
        t["posterior"].sizes["chain"] * t["posterior"].sizes["draw"] for t in (result.amortized, result.reference)
    )
    values = pit(result.amortized, result.reference, draws=min(each, available // 20))["pit"].dataset
    known = {latent.label: latent for latent in scalars(values, latent_names(values))}
    found = {}
    for name in latents:
        of_data = values[known[name].site].transpose("chain", "data", "draw", ...).values
        position: tuple[Any, ...] = (..., *known[name].index)
        chosen = of_data[position]
        found[name] = (("chain", "draw"), chosen.reshape(len(chosen), -1).astype(np.float64))
    coords = {"chain": values["chain"].values, "draw": np.arange(values.sizes["data"] * values.sizes["draw"])}
    return xr.Dataset(found, coords=coords)


def _pit_curves(tree: xr.DataTree, **options: Any) -> Any:
    """ArviZ's `plot_ecdf_pit` with an exact band.

    ArviZ simulates its band, which takes ten times as long and is off by up to a few values of 2,000.
    """
    import arviz_plots
    from arviz_plots.visuals import fill_between_y

    group = tree["pit"].dataset
    count = group.sizes["chain"] * group.sizes["draw"]
    x = np.arange(1, count) / count
    low, high = ecdf_band(count, _PIT_LEVEL, count)
    options |= {"visuals": {"credible_interval": False}, "stats": {"ecdf_pit": {"n_simulations": 1}}}
    plot = arviz_plots.plot_ecdf_pit(tree, group="pit", **options)
    style = {"color": "B1", "alpha": 0.1, "ignore_aes": plot.aes_set}
    plot.map(fill_between_y, "credible_interval", data=group, x=x, y_bottom=low - x, y_top=high - x, **style)
    return plot


def _arviz(function: Callable[..., Any], tree: Any, legend: str | None = None, **options: Any) -> Figure:
    import matplotlib.pyplot as plt
    from cycler import cycler

    before = plt.get_backend()
    plt.switch_backend("agg")
    try:
        with plt.rc_context({**STYLE, "axes.prop_cycle": cycler(color=COLOURS)}):
            plot = function(tree, backend="matplotlib", **options)
            if legend is not None:
                plot.add_legend(legend, title="")
            figure: Figure = plot.viz["figure"].item()
            plt.close(figure)
        return figure
    finally:
        plt.switch_backend(before)

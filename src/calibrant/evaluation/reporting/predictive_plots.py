"""Pictures of predictive checks, as PNG data URIs. A function returns None if its picture can't be made."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import xarray as xr

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
from calibrant.evaluation.statistics.data_statistics import BANDS

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Array = npt.NDArray[np.float64]

CAPTIONS = {
    "entry_coverage": (
        "Entries (pixels) inside central intervals of their posterior predictive distribution, and the share of "
        "entries with a PIT of at most u, less u. Below the diagonal, or falling through the middle, the predicted "
        "spread is too small. A little above it is expected even of a true model, because each datum is used twice: "
        "compare with the dotted line, the same for data that the model simulates. Bands and bars are two standard "
        "errors."
    ),
    "prior_statistics": (
        "Statistics of the data (grey) and of data that the model simulates from its prior (line). A true model's line "
        "follows the grey. The outermost bars hold all that lies beyond."
    ),
    "aggregate_posterior": (
        "One guide draw for every datum, pooled (line), and the prior (grey): the latents that differ most. Under a "
        "true model and an exact guide the two agree; a line narrower than the grey is a prior that the data do not "
        "fill. The outermost bars hold all that lies beyond."
    ),
}
_BARS = 2.0  # half width of bands and error bars, in standard errors
_ACROSS = 3
_REACH = 2.0  # the picture extends beyond the narrower distribution by so many of its widths


def entry_coverage(result: xr.Dataset) -> Figure | None:
    """The picture of `coverage_figure`."""
    return coverage_figure(result) if np.isfinite(result["coverage"].values).any() else None


def coverage_figure(result: xr.Dataset) -> Figure:
    """Coverage of central intervals of entries, and the distribution of their PIT minus the uniform one.

    Beside the data are the data that the model simulates (dotted), where the result has them: below the diagonal, or
    falling through the middle, the predicted spread is smaller than the spread of the data. Bands and bars are two
    standard errors.

    Args:
        result: a result of `pixel_calibration` or `predictive_check`.

    Returns:
        A figure of matplotlib, made without pyplot.
    """
    with new_figure(WIDTH, 3.2) as figure:
        left, right = figure.subplots(1, 2)
        left.plot([0, 1], [0, 1], color=INK, lw=1.0, ls="--")
        right.axhline(0.0, color=INK, lw=1.0, ls="--")
        for i, site in enumerate(result["observed"].values.tolist()):
            one, colour = result.sel(observed=site), cycled(COLOURS, i)
            if "coverage_null" in one:
                _coverage(left, right, one, "_null", {"color": REFERENCE, "ls": ":", "lw": 1.6}, "simulated data")
            label = "data" if result.sizes["observed"] == 1 else plain_axes(site)
            _coverage(left, right, one, "", {"color": colour, "ls": cycled(LINES, i), "lw": 1.6}, label)
            bars: dict[str, Any] = {"fmt": cycled(MARKERS, i), "ms": 5, "mfc": "white", "mew": 1.5, "capsize": 2}
            errors = _BARS * one["coverage_se"].values
            left.errorbar(one["level"].values, one["coverage"].values, errors, color=colour, **bars)
        left.set(xlabel="level of the interval", ylabel="entries inside", xlim=(0, 1), ylim=(0, 1), aspect="equal")
        right.set(xlabel="u (PIT)", ylabel="ECDF of the PIT, less u", xlim=(0, 1))
        handles, labels = left.get_legend_handles_labels()
        shown = dict(zip(labels, handles, strict=True))  # names the null once, not for every site
        figure.legend(shown.values(), shown.keys(), loc="outside upper center", ncols=3)
        return figure


def _coverage(left: Axes, right: Axes, one: xr.Dataset, end: str, style: Mapping[str, Any], label: str) -> None:
    """Draw the coverage at all levels, which follows from the ECDF of the PIT, and the ECDF itself."""
    u, ecdf, error = (one[name].values for name in ("u", f"pit_ecdf{end}", f"pit_ecdf{end}_se"))
    middle = len(u) // 2
    left.plot(2.0 * u[middle:] - 1.0, ecdf[middle:] - ecdf[middle::-1], label=label, **style)
    right.plot(u, ecdf - u, **style)
    low, high = (ecdf - u + sign * _BARS * error for sign in (-1.0, 1.0))
    right.fill_between(u, low, high, color=style["color"], alpha=0.2, lw=0)


def prior_statistics(result: xr.Dataset, most: int = 9) -> Figure | None:
    """Histograms of every statistic, for the data and for data that the model simulates."""
    if "prior_statistic" not in result or not result.sizes["statistic"]:
        return None
    labels = result["statistic"].values[:most].tolist()
    panels = [(label, *(result[n].sel(statistic=label).values for n in _STATISTICS)) for label in labels]
    return _densities(panels, "data", "simulated data")


def aggregate_posterior(result: xr.Dataset, most: int = 9) -> Figure | None:
    """Histograms of the latents whose pooled guide draws differ most from the prior, in the order of the model."""
    if "aggregate_draw" not in result or not result.sizes["latent"]:
        return None
    excess = (result["aggregate_wasserstein"] - result["aggregate_wasserstein_null"]).fillna(-np.inf).values
    chosen = np.sort(np.argsort(-excess, kind="stable")[:most])
    labels = result["latent"].values[chosen].tolist()
    panels = [(label, *(result[n].sel(latent=label).values for n in _LATENTS)) for label in labels]
    return _densities(panels, "prior", "guide, pooled over data")


_STATISTICS = ("observed_statistic", "prior_statistic")
_LATENTS = ("prior_draw", "aggregate_draw")


def _densities(panels: Sequence[tuple[str, Array, Array]], filled: str, lined: str) -> Figure:
    """Histograms on common bins, one filled and one a line."""
    from matplotlib.ticker import MaxNLocator

    rows = -(-len(panels) // _ACROSS)
    across = min(_ACROSS, len(panels))
    with new_figure(WIDTH, 1.9 * rows + 0.5) as figure:
        grid = figure.subplots(rows, across, squeeze=False).ravel()
        for axes, (label, under, over) in zip(grid, panels, strict=False):
            bins = _bins(under, over)
            sides: tuple[tuple[Array, dict[str, Any]], ...] = (
                (under, {"histtype": "stepfilled", "color": REFERENCE_FILL, "label": filled}),
                (over, {"histtype": "step", "color": GUIDE, "lw": 1.6, "label": lined}),
            )
            for values, style in sides:
                axes.hist(
                    np.clip(values, bins[0], bins[-1]),
                    bins.tolist(),
                    weights=np.full(len(values), 1.0 / len(values)),
                    **style,
                )
            axes.set_xlabel(plain_axes(f"log {label}" if label.partition(" of ")[0] in BANDS else label))
            axes.yaxis.set_major_locator(MaxNLocator(3))
        for axes in grid[: len(panels) : across]:
            axes.set_ylabel("share")
        for axes in grid[len(panels) :]:
            axes.set_axis_off()
        figure.legend(*grid[0].get_legend_handles_labels(), loc="outside upper center", ncols=2)
        return figure


def _bins(under: Array, over: Array) -> Array:
    """Common bins: one per integer if there are few, else bins over both sides, as wide as suits the narrower side."""
    sides = np.quantile(under, [0.003, 0.997]), np.quantile(over, [0.003, 0.997])
    low, high = min(side[0] for side in sides), max(side[1] for side in sides)
    if high - low < 30 and all((side % 1 == 0).all() for side in (under, over)):
        return np.arange(np.floor(low) - 0.5, high + 1.0)
    narrow = min(sides, key=np.ptp)
    if (reach := _REACH * np.ptp(narrow)) > 0:
        low, high = max(low, narrow[0] - reach), min(high, narrow[1] + reach)
    count = int(np.clip(1.3 * min(len(under), len(over)) ** 0.5, 10, 30))
    return np.linspace(low, high if high > low else low + 1.0, count + 1)

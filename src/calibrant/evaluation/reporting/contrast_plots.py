"""Pictures of posteriors at several contrasts, and in bins of contrast."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import xarray as xr

from calibrant.errors import InferenceError
from calibrant.evaluation.reporting.style import (
    COLOURS,
    INK,
    LINES,
    MARKERS,
    WIDTH,
    cycled,
    new_figure,
    plain_axes,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_CURVES = (
    ("posterior_sd", "posterior sd / prior sd", "linear"),
    ("mean_norm", "norm of posterior mean", "log"),
    ("signal_variance", "variance of posterior mean\nover images", "log"),
    ("scale_cv", "sd / mean of the scale", "linear"),
)
_BINS = (
    ("noise_variance", "posterior variance / prior variance", "linear"),
    ("signal_mean", "norm of posterior mean", "linear"),
    ("signal_variance", "variance of posterior mean\nover images", "linear"),
    ("scale_mean", "mean of the scale", "linear"),
)
_MARKS: Mapping[str, Any] = {"ms": 5, "mfc": "white", "mew": 1.5, "elinewidth": 1.2, "capsize": 2}


def contrast_figure(results: Mapping[str, xr.Dataset]) -> Figure:
    """The curves of a contrast experiment: exact as lines, the guide as markers with error bars.

    The dashed line is the prior, the dotted one the contrast at which an image is as strong as the noise.

    Args:
        results: name of a model → result of `contrast_experiment`, all about the same grey value.

    Returns:
        A figure of matplotlib, made without pyplot.

    Raises:
        InferenceError: for no results, or results about several grey values.
    """
    about = {str(result.attrs["about"]) for result in results.values()}
    if len(about) != 1:
        raise InferenceError(f"the results are about {sorted(about) or 'nothing'}: give those about one grey value")
    of_noise = about == {"mean"}
    with new_figure(WIDTH, 6.2) as figure:
        grid = _panels(figure, results, _CURVES, "contrast (1 = noise-equivalent)" if of_noise else "share of contrast")
        if of_noise:
            for axes in grid:
                axes.set_xscale("log")
                axes.axvline(1.0, color="#999999", lw=0.8, ls=(0, (1, 2)))
        _finish(figure, grid)
        return figure


def bins_figure(results: Mapping[str, xr.Dataset]) -> Figure:
    """The four curves of images at their own contrast: exact as lines, the guide as markers with error bars.

    The dashed line is the prior.

    Args:
        results: name of a model → result of `contrast_bins`.

    Returns:
        A figure of matplotlib, made without pyplot.

    Raises:
        InferenceError: for no results.
    """
    if not results:
        raise InferenceError("there is nothing to draw: give {name of a model: result of contrast_bins}")
    with new_figure(WIDTH, 6.2) as figure:
        _finish(figure, _panels(figure, results, _BINS, "contrast of the image (data units)"))
        return figure


def _panels(figure: Figure, results: Mapping[str, xr.Dataset], panels: Any, label: str) -> list[Axes]:
    """A panel for every statistic that some result has."""
    shown = [panel for panel in panels if any(np.isfinite(one[panel[0]].values).any() for one in results.values())]
    grid = figure.subplots(2, 2, sharex=True).ravel()
    for axes, (name, ylabel, scale) in zip(grid, shown, strict=False):
        for i, (model, result) in enumerate(results.items()):
            _curve(axes, result, name, scale == "log", i, plain_axes(model))
        axes.set(yscale=scale, ylabel=ylabel, xlabel=label)
        axes.tick_params(labelbottom=True)
    for axes in grid[len(shown) :]:
        axes.set_axis_off()
    return list(grid[: len(shown)])


def _curve(axes: Axes, result: xr.Dataset, name: str, log: bool, i: int, model: str) -> None:
    unit = result.attrs["prior_sd"] if name == "posterior_sd" else 1.0
    kind = "exact" if result.attrs.get("reference_method", "exact") == "exact" else "reference"
    for source in result["source"].values.tolist():
        y, se = (result[f"{name}{end}"].sel(source=source).values / unit for end in ("", "_se"))
        if log:  # noise may leave values below zero, which a logarithmic axis cannot show
            y = np.where(y > 0, y, np.nan)
        there = np.isfinite(y)
        x = result["contrast"].values[there]
        if source == "exact":
            axes.plot(x, y[there], ls=cycled(LINES, i), color=cycled(COLOURS, i), lw=2.0, label=f"{kind}, {model}")
        else:
            marks = {"fmt": cycled(MARKERS, i), "color": cycled(COLOURS, i), "label": f"guide, {model}", **_MARKS}
            axes.errorbar(x, y[there], se[there], **marks)


def _finish(figure: Figure, grid: list[Axes]) -> None:
    """The prior's line in the first panel, and a legend for all."""
    first = grid[0]
    first.axhline(1.0, color=INK, lw=1.0, ls="--")
    place: dict[str, Any] = {
        "xy": (1.0, 1.0),
        "xytext": (0, 3),
        "xycoords": ("axes fraction", "data"),
        "textcoords": "offset points",
    }
    first.annotate("prior", ha="right", **place)
    first.set_ylim(0.0, max(1.15, first.get_ylim()[1]))
    handles, labels = first.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=2)

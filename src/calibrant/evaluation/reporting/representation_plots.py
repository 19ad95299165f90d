"""Pictures of representations' uncertainties: error versus reject, and reliability of match probabilities."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np
import xarray as xr

from calibrant.evaluation.reporting.drawn_results import checked_results
from calibrant.evaluation.reporting.style import GUIDE, INK, REFERENCE, REFERENCE_FILL, WIDTH, new_figure, plain_axes

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_COLUMNS, _HEIGHT = 3, 2.7  # panels in a row; height of a panel, in inches


def reject_figure(results: Mapping[str, xr.Dataset], ylabel: str = "error of the images kept") -> Figure:
    """Error versus reject of each representation, beside the oracle and a random order.

    The band is the 95% interval of the curve. The title has the normalised area: 1 for the oracle, 0 for a random
    order.

    Args:
        results: name → result of `reject_curve` or `representation_metrics`; a panel each.
        ylabel: what the error is.

    Returns:
        A figure of matplotlib, made without pyplot.

    Raises:
        InferenceError: for no results, or others.
    """
    with _panels(results, "reject_", "normalised_area", "reject_curve") as (figure, panels):
        for axes, name, result in panels:
            _reject(axes, result)
            area = _with_interval(result, "normalised_area")
            axes.set(
                title=f"{plain_axes(name)}\narea {area}",
                xlabel="share rejected",
                xlim=(0, 1),
                ylim=(0, None),
            )
        panels[0][0].set_ylabel(ylabel)
        _legend(figure, panels[0][0])
        return figure


def match_figure(results: Mapping[str, xr.Dataset]) -> Figure:
    """Reliability of match probabilities: the share of pairs that match in each bin, beside the predicted one.

    Bars are 95% intervals of the shares, grey columns the share of all pairs in each bin. The title has the slope of
    logistic recalibration: 1 for a calibrated prediction, below 1 for one that is too sure.

    Args:
        results: name → result of `match_calibration`, or of `representation_metrics` with pairs; a panel each.

    Returns:
        A figure of matplotlib, made without pyplot.

    Raises:
        InferenceError: for no results, or others.
    """
    with _panels(results, "match_", "calibration_error", "match_calibration") as (figure, panels):
        for axes, name, result in panels:
            _reliability(axes, result)
            slope = _with_interval(result, "slope")
            axes.set(title=f"{plain_axes(name)}\nslope {slope}", xlabel="predicted", xlim=(0, 1), ylim=(0, 1))
        panels[0][0].set_ylabel("share that matches")
        _legend(figure, panels[0][0])
        return figure


@contextmanager
def _panels(
    results: Mapping[str, xr.Dataset], start: str, needed: str, function: str
) -> Iterator[tuple[Figure, list[tuple[Axes, str, xr.Dataset]]]]:
    """A figure with a panel for each result, whose variables have lost the start of their names."""
    checked_results(results, function, ())
    found = {name: _unnamed(result, start) for name, result in results.items()}
    checked_results(found, function, (needed,))
    columns = min(_COLUMNS, len(found))
    rows = -(-len(found) // columns)
    with new_figure(WIDTH if columns > 1 else WIDTH / 1.8, _HEIGHT * rows + 0.5) as figure:
        grid = figure.subplots(rows, columns, squeeze=False, sharex=True, sharey=True).ravel()
        for axes in grid[len(found) :]:
            axes.set_visible(False)
        for axes in grid:
            axes.set_xticks([0.0, 0.5, 1.0])
            axes.tick_params(labelbottom=True)  # where no panel is below
        yield figure, [(axes, *item) for axes, item in zip(grid, found.items(), strict=False)]


def _unnamed(result: xr.Dataset, start: str) -> xr.Dataset:
    names = {name: str(name).removeprefix(start) for name in result.data_vars if str(name).startswith(start)}
    return result[list(names)].rename(names) if names else result


def _reject(axes: Axes, result: xr.Dataset) -> None:
    shares = result["rejected"].values
    low, high = (result[f"error_{end}"].values for end in ("low", "high"))
    axes.fill_between(shares, low, high, color=GUIDE, alpha=0.25, lw=0)
    axes.plot(shares, result["error"].values, color=GUIDE, lw=1.8, label="by uncertainty")
    axes.plot(shares, result["oracle"].values, color=REFERENCE, lw=1.4, ls="--", label="oracle")
    axes.axhline(float(result["area_random"]), color=INK, lw=1.0, ls=":", label="random order")


def _reliability(axes: Axes, result: xr.Dataset) -> None:
    predicted, observed = result["predicted"].values, result["observed"].values
    there = np.isfinite(observed)
    ends = [result[f"observed_{end}"].values[there] for end in ("low", "high")]
    bars = np.abs(np.stack(ends) - observed[there])
    count = result["count"].values
    style: dict[str, Any] = {"color": REFERENCE_FILL, "alpha": 0.6, "label": "share of pairs"}
    axes.bar(predicted[there], (count / count.sum())[there], width=0.02, **style)
    axes.plot([0, 1], [0, 1], color=INK, lw=1.0, ls=":", label="calibrated")
    axes.errorbar(
        predicted[there], observed[there], bars, color=GUIDE, fmt="o", ms=4, capsize=2, label="observed", clip_on=False
    )


def _with_interval(result: xr.Dataset, name: str) -> str:
    value, low, high = (float(result[f"{name}{end}"]) for end in ("", "_low", "_high"))
    if not np.isfinite(value):
        return "not defined"
    text = f"{value:.2f} [{low:.2f}, {high:.2f}]" if np.isfinite(low) else f"{value:.2f}"
    return text.replace("-", "−")


def _legend(figure: Figure, axes: Axes) -> None:
    handles, labels = axes.get_legend_handles_labels()
    columns = len(labels) if figure.get_figwidth() >= WIDTH else 2
    figure.legend(handles, labels, loc="outside upper center", ncols=columns)

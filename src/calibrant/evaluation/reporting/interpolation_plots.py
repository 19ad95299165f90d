"""Pictures of interpolation: uncertainty between images."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import xarray as xr

from calibrant.errors import InferenceError
from calibrant.evaluation.reporting.style import COLOURS, INK, MARKERS, WIDTH, cycled, new_figure, plain_axes
from calibrant.evaluation.uncertainty.moments import mean_and_error

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_SOURCES = {"amortized": "guide", "exact": "exact"}


def interpolation_figure(results: Mapping[str, xr.Dataset]) -> Figure:
    """Uncertainty along blends of images, averaged over pairs, and the share of pairs that are concave.

    Look whether a curve is highest between the images, as an uncertainty that knows of improbable images would be, and
    whether the exact posterior (markers) agrees with the guide (lines). The dashed line is the prior. A third panel has
    the label entropy, where all results have it.

    Args:
        results: name of a model → result of `interpolation_experiment`.

    Returns:
        A figure of matplotlib, made without pyplot.

    Raises:
        InferenceError: for no results.
    """
    if not results:
        raise InferenceError("there is nothing to draw: give results as {name: result of interpolation_experiment}")
    entropy = all("label_entropy" in result for result in results.values())
    with new_figure(WIDTH * (1.35 if entropy else 1.0), 3.8) as figure:
        panels = figure.subplots(1, 3 if entropy else 2)
        for place, (name, result) in enumerate(results.items()):
            look = {"color": cycled(COLOURS, place), "marker": cycled(MARKERS, place), "name": plain_axes(name)}
            _course(panels[0], result, "posterior_sd", **look)
            _shares(panels[1], result, **look)
            if entropy:
                _course(panels[2], result, "label_entropy", **look)
        panels[0].axhline(1.0, color=INK, lw=1.0, ls="--", label="prior")
        panels[0].set(xlabel="place λ between the images", ylabel="posterior sd / prior sd, mean over pairs")
        panels[0].set_ylim(bottom=0.0)
        panels[1].set(xlabel="vertex in ½ ± t", ylabel="share of pairs, concave beyond error", ylim=(-0.03, 1.03))
        if entropy:
            panels[2].set(xlabel="place λ between the images", ylabel="entropy of the labels (nats)")
            panels[2].set_ylim(bottom=0.0)
        handles, labels = panels[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside upper center", ncols=min(5, len(labels)))
        return figure


def _course(axes: Axes, result: xr.Dataset, key: str, color: str, marker: str, name: str) -> None:
    """Means over pairs of the guide as a line with a band of two standard errors, of the reference as markers."""
    steps = result["step"].values
    for source, label in _SOURCES.items():
        mean, error = mean_and_error(result[key].sel(source=source).transpose("step", "pair").values)
        there = np.isfinite(mean)
        if not there.any():
            continue
        if source == "amortized":
            axes.plot(steps, mean, color=color, lw=1.8, label=f"{name}, {label}")
            axes.fill_between(steps, mean - 2 * error, mean + 2 * error, color=color, alpha=0.15, lw=0)
        else:
            style: dict[str, Any] = {"color": color, "marker": marker, "ls": "", "mfc": "white", "capsize": 2}
            axes.errorbar(steps[there], mean[there], 2 * error[there], label=f"{name}, {label}", **style)


def _shares(axes: Axes, result: xr.Dataset, color: str, marker: str, name: str) -> None:
    for source in _SOURCES:
        share = result["share_concave"].sel(source=source)
        if np.isfinite(share).all():
            style: dict[str, Any] = (
                {"lw": 1.8} if source == "amortized" else {"ls": ":", "marker": marker, "mfc": "white"}
            )
            axes.plot(result["threshold"].values, share.values, color=color, clip_on=False, **style)

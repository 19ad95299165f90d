"""The picture of predicted probabilities: how often a value occurs where it has which probability."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import xarray as xr

from calibrant.errors import InferenceError
from calibrant.evaluation.judgements.on_probabilities import reliability_bins
from calibrant.evaluation.reporting.style import (
    COLOURS,
    INK,
    MARKERS,
    WIDTH,
    cycled,
    new_figure,
    plain_axes,
)
from calibrant.evaluation.results import RunResult

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_BINS = 10
_BARS = 2.0  # half width of error bars, in standard errors


def reliability(result: RunResult) -> Figure | None:
    """The picture of `reliability_figure`; None without predictions that can be listed."""
    found = result.probabilities
    return None if found is None or found.attrs["sites"] == "[]" else reliability_figure(found)


def reliability_figure(predicted: xr.Dataset) -> Figure:
    """Shares of the data in which a value occurs, over its predicted probability, in ten bins of equally many data.

    It is the second of two values, or the most probable one of several. Bars are two standard errors; right
    probabilities lie on the dashed line.

    Args:
        predicted: result of `predicted_probabilities`.

    Returns:
        A figure of matplotlib, made without pyplot.

    Raises:
        InferenceError: for predictions without a site with finitely many values.
    """
    names = json.loads(predicted.attrs["sites"])
    if not names:
        raise InferenceError("no observed site has finitely many values, so that there are no probabilities to show")
    with new_figure(WIDTH / 2, 3.4) as figure:
        axes = figure.subplots()
        axes.plot([0, 1], [0, 1], color=INK, lw=1.0, ls="--")
        for place, name in enumerate(names):
            bins = reliability_bins(predicted, name, _BINS)
            means, shares, errors = zip(*((one.predicted, one.found, _BARS * one.error) for one in bins), strict=True)
            colour, marker = cycled(COLOURS, place), cycled(MARKERS, place)
            axes.errorbar(means, shares, errors, fmt=marker, ms=5, capsize=2, color=colour, label=plain_axes(name))
        axes.set(xlabel="predicted probability", ylabel="share of the data", xlim=(0, 1), ylim=(-0.05, 1.05))
        axes.legend()
        return figure

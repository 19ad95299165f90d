"""Pictures of posteriors at corrupted images."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import xarray as xr

from calibrant.errors import InferenceError
from calibrant.evaluation.reporting.style import GUIDE, INK, REFERENCE, WIDTH, new_figure, plain_axes

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_HEIGHT = 2.3  # of a panel, in inches
_LABELS = {
    "posterior_sd": "posterior sd / prior sd",
    "entropy": "entropy (nats)",
    "shift": "shift of the mean (prior sd)",
    "coverage": "coverage of 90% intervals",
}
_LINES: Mapping[str, dict[str, Any]] = {
    "exact": {"color": REFERENCE, "marker": "o", "label": "exact posterior"},
    "amortized": {"color": GUIDE, "marker": "s", "label": "guide"},
}


def corruption_figure(results: Mapping[str, xr.Dataset], statistic: str = "posterior_sd") -> Figure:
    """Curves of a statistic over the levels of every corruption, of the exact posterior and of the guide.

    Error bars are two standard errors over images. The dashed line is the prior's sd or entropy, or for the coverage of
    true latents of simulated images the level 90%.

    Args:
        results: name of a model → result of `corruption_experiment`; a row of panels each.
        statistic: "posterior_sd", "entropy", "shift", or "coverage" where images were simulated.

    Returns:
        A figure of matplotlib, made without pyplot.

    Raises:
        InferenceError: for no results, or a statistic that they do not have.
    """
    name = statistic if statistic == "coverage" else f"{statistic}_mean"
    if not results or statistic not in _LABELS or any(name not in result for result in results.values()):
        raise InferenceError(
            f"there is no {statistic!r} to draw: give results of corruption_experiment and one of {', '.join(_LABELS)} "
            "('coverage' needs simulated=)"
        )
    kinds = next(iter(results.values()))["corruption"].values.tolist()
    with new_figure(WIDTH, _HEIGHT * len(results) + 0.9) as figure:
        panels = figure.subplots(len(results), len(kinds), squeeze=False, sharey="row")
        for row, (model, result) in zip(panels, results.items(), strict=True):
            for axes, kind in zip(row, kinds, strict=True):
                _curves(axes, result.sel(corruption=kind), name)
                _line(axes, result, statistic)
            row[0].set_ylabel(f"{plain_axes(model)}\n{_LABELS[statistic]}")
            if statistic != "entropy":
                row[0].set_ylim(0.0, None)
        for top, bottom, kind in zip(panels[0], panels[-1], kinds, strict=True):
            top.set_title(plain_axes(kind))
            bottom.set_xlabel(textwrap.fill(str(result["unit"].sel(corruption=kind).values), 20), fontsize=8.5)
        handles, labels = panels[0][0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside upper center", ncols=len(labels))
        return figure


def _curves(axes: Axes, result: xr.Dataset, name: str) -> None:
    places = np.arange(result.sizes["level"])
    for source in result["source"].values.tolist():
        mean, error = (result[f"{name}{end}"].sel(source=source).values for end in ("", "_se"))
        axes.errorbar(places, mean, 2.0 * error, ms=4, lw=1.3, capsize=2, **_LINES[source])
    labels = [f"{strength:.3g}".removeprefix("0") or "0" for strength in result["strength"].values]
    axes.set_xticks(places, labels, fontsize=7.5, rotation=60)


def _line(axes: Axes, result: xr.Dataset, statistic: str) -> None:
    """The prior, or the level of the intervals."""
    lines = {
        "posterior_sd": (1.0, "prior"),
        "entropy": (result.attrs["prior_entropy"], "prior"),
        "coverage": (0.9, "90%"),
    }
    if statistic in lines:
        value, label = lines[statistic]
        axes.axhline(value, color=INK, lw=1.0, ls="--", label=label)

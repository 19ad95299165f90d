"""Pictures of what posteriors are at several sets of images: violins of scores and of label entropies."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import xarray as xr

from calibrant.errors import InferenceError
from calibrant.evaluation.reporting.style import GUIDE, INK, REFERENCE, REFERENCE_FILL, WIDTH, new_figure, plain_axes

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_HEIGHT = 2.6  # of a panel, in inches
_ROOM = 1.3  # of the axis, for the AUROCs above the violins
_SIDES: Mapping[str, tuple[Any, str, str, str]] = {
    "exact": ("low", REFERENCE_FILL, REFERENCE, "exact posterior"),
    "amortized": ("high", GUIDE, GUIDE, "guide"),
}

Values = npt.NDArray[np.float64]


def score_figure(results: Mapping[str, xr.Dataset], matching: str = "as shown") -> Figure:
    """Violins of the scores of every set: posterior sd over prior sd, of the exact posterior and of the guide.

    The prior is a dashed line, medians are marked, and AUROCs with their 95% intervals stand above each set.

    Args:
        results: name of a model → result of `ood_experiment`; a panel each.
        matching: "as shown", "contrast" or "power".

    Returns:
        A figure of matplotlib, made without pyplot.

    Raises:
        InferenceError: for no results, or another way of matching.
    """
    ways = {way for result in results.values() for way in result["matching"].values.tolist()}
    if matching not in ways:
        raise InferenceError(f"matching={matching!r} is not among {sorted(ways)}, the ways of matching of the results")
    highest = max(1.0, *(float(np.nanmax(r["score"].sel(matching=matching))) for r in results.values()))
    with new_figure(WIDTH, _HEIGHT * len(results) + 0.5) as figure:
        rows = figure.subplots(len(results), 1, squeeze=False, sharey=True)[:, 0]
        for axes, (name, whole) in zip(rows, results.items(), strict=True):
            result = whole.sel(matching=matching)
            sets = ["inside", *result["set"].values.tolist()]
            _violins(axes, result, "score", sets)
            axes.axhline(1.0, color=INK, lw=1.0, ls="--", label="prior")
            _print_aurocs(axes, result)
            axes.set(ylabel="posterior sd / prior sd", ylim=(0.0, _ROOM * highest), title=plain_axes(name))
        _legend(figure, rows[0])
        return figure


def label_entropy_figure(results: Mapping[str, xr.Dataset]) -> Figure:
    """Violins of the label entropy of every set, of draws of the exact posterior and of the guide.

    A dashed line is the largest entropy that there can be, medians are marked.

    Args:
        results: name of a model → result of `label_entropy`; a panel each.

    Returns:
        A figure of matplotlib, made without pyplot.

    Raises:
        InferenceError: for no results.
    """
    if not results:
        raise InferenceError("there is nothing to draw: give {name of a model: result of label_entropy}")
    with new_figure(WIDTH, _HEIGHT * len(results) + 0.5) as figure:
        rows = figure.subplots(len(results), 1, squeeze=False, sharey=True)[:, 0]
        for axes, (name, result) in zip(rows, results.items(), strict=True):
            _violins(axes, result, "entropy", result["set"].values.tolist())
            most = f"log {result.attrs['classes']}, the largest"
            axes.axhline(math.log(result.attrs["classes"]), color=INK, lw=1.0, ls="--", label=most)
            axes.set(ylabel="label entropy (nats)", ylim=(0.0, None), title=plain_axes(name))
        _legend(figure, rows[0])
        return figure


def _violins(axes: Axes, result: xr.Dataset, name: str, sets: list[str]) -> None:
    """Half a violin per source and set, side by side, with the median of each."""
    for source in result["source"].values.tolist():
        side, fill, edge, label = _SIDES[source]
        values = [_finite(result, name, source, of_set) for of_set in sets]
        drawn = [(place, found) for place, found in enumerate(values) if len(found)]
        places = [place for place, _ in drawn]
        parts: Any = axes.violinplot([found for _, found in drawn], places, widths=0.8, side=side, showextrema=False)
        for body in parts["bodies"]:
            body.set(facecolor=fill, edgecolor=edge, alpha=0.6, linewidth=0.8)
        shift = -0.06 if side == "low" else 0.06
        medians = [float(np.median(found)) for _, found in drawn]
        marker: dict[str, Any] = {"marker": "D", "ms": 5, "ls": "", "color": edge, "mec": "white"}
        axes.plot([place + shift for place in places], medians, label=f"{label} (median)", **marker)
    axes.set_xticks(range(len(sets)), [plain_axes(of_set) for of_set in sets])
    axes.set_xlim(-0.6, len(sets) - 0.4)


def _finite(result: xr.Dataset, name: str, source: str, of_set: str) -> Values:
    values = result[name].sel(source=source).values[result["of_set"].values == of_set]
    return values[np.isfinite(values)]


def _print_aurocs(axes: Axes, result: xr.Dataset) -> None:
    """AUROC and its interval above each set, a line per source."""
    names = {"exact": "exact", "amortized": "guide"}
    place: Any = axes.get_xaxis_transform()
    for number, of_set in enumerate(result["set"].values):
        lines = []
        for source in result["source"].values.tolist():
            one = result.sel(source=source, set=of_set)
            value, low, high = (float(one[f"auroc{end}"]) for end in ("", "_low", "_high"))
            lines.append(f"{names[source]} {value:.2f} [{low:.2f}, {high:.2f}]")
        axes.text(number + 1, 1.0, "\n".join(lines), transform=place, ha="center", va="top", fontsize=7.5)
    axes.text(0, 1.0, "AUROC\n[95% interval]", transform=place, ha="center", va="top", fontsize=7.5)


def _legend(figure: Figure, axes: Axes) -> None:
    handles, labels = axes.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=len(labels))

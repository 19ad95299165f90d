"""Pictures of what representation uncertainties are good for: retrieval without some images, caps, learning curves."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

import xarray as xr

from calibrant.evaluation.reporting.drawn_results import checked_results
from calibrant.evaluation.reporting.style import COLOURS, INK, LINES, MARKERS, WIDTH, cycled, new_figure, plain_axes

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_HEIGHT = 2.9  # of a row of panels, in inches
_LEFT_OUT = {"queries": "of the queries", "database": "of the database", "both": "of both"}


def safe_retrieval_figure(results: Mapping[str, xr.Dataset]) -> Figure:
    """R@1 as images of large uncertainty are left out, and what a smaller database itself does to it.

    Left: R@1 of the queries that remain. Right: the same queries, minus databases that lack as many random images.

    Args:
        results: name, such as that of an uncertainty → result of `safe_retrieval`; a row of panels each.

    Returns:
        A figure of matplotlib, made without pyplot.

    Raises:
        InferenceError: for no results, or others.
    """
    checked_results(results, "safe_retrieval", ("gain_over_random", "keep", "dropped"))
    with new_figure(WIDTH, _HEIGHT * len(results) + 0.4) as figure:
        grid = figure.subplots(len(results), 2, squeeze=False, sharex=True, sharey="col")
        for (left, right), (name, result) in zip(grid, results.items(), strict=True):
            dropped = 100 * (1 - result["keep"].values)
            for i, (way, label) in enumerate(_LEFT_OUT.items()):
                _curve(left, dropped, result.sel(dropped=way), "recall", i, f"left out {label}")
                if way != "queries":
                    _curve(right, dropped, result.sel(dropped=way), "gain_over_random", i, None)
            whole = float(result["recall"].sel(dropped="nothing")[0])
            left.axhline(whole, color=INK, lw=1.0, ls=":", label="nothing left out")
            right.axhline(0.0, color=INK, lw=1.0, ls="--", label="random images left out")
            unsafe = "" if result.attrs["safe"] else " (needs labels: not safe)"
            left.set(title=plain_axes(f"{name}{unsafe}"), ylabel="R@1 of remaining queries")
            right.set(ylabel="R@1 minus random images")
        for axes in grid[-1]:
            axes.set_xlabel("images left out (%)")
        _legend(figure, grid[0])
        return figure


def credible_figure(results: Mapping[str, xr.Dataset]) -> Figure:
    """Measured coverage of credible caps beside the level that they promise, and how many images they hold.

    Args:
        results: name → result of `credible_retrieval`; a curve each.

    Returns:
        A figure of matplotlib, made without pyplot.

    Raises:
        InferenceError: for no results, or others.
    """
    checked_results(results, "credible_retrieval", ("coverage", "size_mean", "level"))
    with new_figure(WIDTH, _HEIGHT + 0.4) as figure:
        left, right = figure.subplots(1, 2)
        left.plot([0, 1], [0, 1], color=INK, lw=1.0, ls="--", label="as promised")
        for i, (name, result) in enumerate(results.items()):
            levels = result["level"].values
            _curve(left, levels, result, "coverage", i, plain_axes(name))
            marks = {"marker": cycled(MARKERS, i), "ls": cycled(LINES, i), "color": cycled(COLOURS, i)}
            right.plot(levels, result["size_mean"].values, ms=4, lw=1.5, **marks)
        left.set(xlabel="probability of the cap", ylabel="share of true matches inside", xlim=(0, 1), ylim=(0, 1.02))
        right.set(xlabel="probability of the cap", ylabel="images retrieved, mean", yscale="log", xlim=(0, 1))
        _legend(figure, [left])
        return figure


def learning_figure(results: Mapping[str, xr.Dataset]) -> Figure:
    """Learning curves of a classifier that chooses the images to label, with 95% intervals.

    Args:
        results: name, such as that of an uncertainty → result of `active_learning`; a panel each.

    Returns:
        A figure of matplotlib, made without pyplot.

    Raises:
        InferenceError: for no results, or others.
    """
    checked_results(results, "active_learning", ("accuracy", "acquisition", "labelled"))
    with new_figure(WIDTH, _HEIGHT * len(results) + 0.4) as figure:
        rows = figure.subplots(len(results), 1, squeeze=False, sharex=True)[:, 0]
        for axes, (name, result) in zip(rows, results.items(), strict=True):
            for i, way in enumerate(result["acquisition"].values.tolist()):
                _curve(axes, result["labelled"].values, result.sel(acquisition=way), "accuracy", i, plain_axes(way))
            axes.set(title=plain_axes(name), ylabel="accuracy")
        rows[-1].set_xlabel("labelled images")
        _legend(figure, [rows[0]])
        return figure


def _curve(axes: Axes, x: Any, result: xr.Dataset, name: str, i: int, label: str | None) -> None:
    """A line with a band for its 95% intervals."""
    colour = cycled(COLOURS, i)
    axes.fill_between(x, result[f"{name}_low"].values, result[f"{name}_high"].values, color=colour, alpha=0.15, lw=0)
    marks = {"marker": cycled(MARKERS, i), "ls": cycled(LINES, i), "color": colour, "label": label}
    axes.plot(x, result[name].values, ms=4, lw=1.5, **marks)


def _legend(figure: Figure, panels: Iterable[Axes]) -> None:
    """One legend above all panels, for what these panels show."""
    found: dict[str, Any] = {}
    for axes in panels:
        handles, labels = axes.get_legend_handles_labels()
        found |= dict(zip(labels, handles, strict=True))
    figure.legend(list(found.values()), list(found), loc="outside upper center", ncols=3)

"""Pictures of rate and distortion, and of the parts of the rate."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import xarray as xr

from calibrant.errors import InferenceError
from calibrant.evaluation.reporting.style import (
    COLOURS,
    GUIDE,
    INK,
    MARKERS,
    REFERENCE,
    WIDTH,
    cycled,
    new_figure,
    plain_axes,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_ARROW = 1.2  # the end of an arrow, in units of the ceiling at which it starts
Point = tuple[float, float]  # average rate and average distortion, in nats


def rate_distortion_figure(
    curve: Mapping[str, Point],
    others: Mapping[str, Point] | None = None,
    splits: Mapping[str, xr.Dataset] | None = None,
    curve_name: str = "β",
) -> Figure:
    """Distortion against rate: a curve of models, such as those of several β, and other models beside it.

    Lines of equal ELBO fall by one nat per nat. With `splits`, a second panel shows mutual information and marginal KL
    of the named models; the ceiling log N of the mutual information is a dotted line in both, and where no split is
    known, an arrow points up from the ceiling.

    Args:
        curve: name (a value of β) → (average rate, average distortion) in nats, in the order of the curve.
        others: name → the same, for models that are marked one by one.
        splits: name → result of `information`, for any of these models.
        curve_name: what the names of the curve are.

    Returns:
        A figure of matplotlib, made without pyplot.

    Raises:
        InferenceError: for no points, or splits of models without a point.
    """
    marked, known = dict(others or {}), dict(splits or {})
    if not {**curve, **marked}:
        raise InferenceError("there is nothing to draw: give the curve or other models as {name: (rate, distortion)}")
    if unknown := set(known) - {*curve, *marked}:
        raise InferenceError(f"splits of {sorted(unknown)} have no point: give their (rate, distortion) too")
    with new_figure(WIDTH, 3.6) as figure:
        left, *right = figure.subplots(1, 2 if known else 1, squeeze=False)[0]
        _plane(left, curve, marked, curve_name)
        if right:
            _parts(right[0], {**curve, **marked}, known)
            for axes, draw in ((left, left.axvline), (right[0], right[0].axhline)):
                for ceiling in sorted({float(split["ceiling"]) for split in known.values()}):
                    draw(ceiling, color=INK, lw=1.0, ls=":", label="log N" if axes is right[0] else None)
        handles = {label: handle for axes in (left, *right) for handle, label in zip(*_legend(axes), strict=True)}
        figure.legend(handles.values(), handles.keys(), loc="outside upper center", ncols=4)
        return figure


def _legend(axes: Axes) -> tuple[list[Any], list[str]]:
    handles, labels = axes.get_legend_handles_labels()
    return list(handles), list(labels)


def _plane(axes: Axes, curve: Mapping[str, Point], others: Mapping[str, Point], curve_name: str) -> None:
    if curve:
        rates, distortions = np.array(list(curve.values())).T
        axes.plot(rates, distortions, color=REFERENCE, marker="o", ms=4, lw=1.4, label=plain_axes(curve_name))
        for name, point in curve.items():
            axes.annotate(plain_axes(name), point, xytext=(4, 3), textcoords="offset points", fontsize=9)
    for i, (name, (rate, distortion)) in enumerate(others.items()):
        style: dict[str, Any] = {"marker": cycled(MARKERS, i + 1), "color": cycled(COLOURS, i), "ls": "", "ms": 8}
        axes.plot([rate], [distortion], label=plain_axes(name), **style)
    axes.set(xlabel="rate (nats per datum)", ylabel="distortion (nats per datum)")


def _parts(axes: Axes, points: Mapping[str, Point], splits: Mapping[str, xr.Dataset]) -> None:
    """Mutual information and marginal KL of models along the axis."""
    names = [name for name in points if name in splits]
    for place, name in enumerate(names):
        if not bool(splits[name]["split_known"]):
            low = float(splits[name]["ceiling"])
            arrow = {"arrowstyle": "->", "color": COLOURS[0], "lw": 1.6}
            axes.annotate("", (place, _ARROW * low), (place, low), arrowprops=arrow)
            axes.plot([place], [_ARROW * low], alpha=0.0)  # the axis reaches so far
    for key, label, colour, marker in (
        ("mutual_information", "mutual information", COLOURS[0], "o"),
        ("marginal_kl", "marginal KL", GUIDE, "s"),
    ):
        values, errors = (np.array([float(splits[name][f"{key}{end}"]) for name in names]) for end in ("", "_se"))
        axes.errorbar(range(len(names)), values, 2.0 * errors, color=colour, fmt=marker, ms=5, capsize=2, label=label)
    bounds = [float(splits[name]["classifier_kl"]) for name in names]
    axes.plot(range(len(names)), bounds, color=GUIDE, ls="", marker="^", mfc="white", label="classifier's bound")
    axes.set_xticks(range(len(names)), [plain_axes(name) for name in names], rotation=30, ha="right")
    axes.set(ylabel="nats per datum")

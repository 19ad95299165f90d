"""The picture of a training: ELBO over epochs, and noise scales where they are learned or measured."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
History = Sequence[dict[str, float]]


def training_figure(trained: Sequence[tuple[str, str, History]]) -> Figure:
    """ELBO of training and held-out data over epochs, without its steep start; below it the noise scales.

    Args:
        trained: for every training, the name of the model (or ""), a colour, and its history, two rows or more.
    """
    from matplotlib.ticker import MaxNLocator

    from calibrant.evaluation.reporting.style import WIDTH, new_figure, plain_axes

    noisy = [(colour, history) for _, colour, history in trained if _noises(history)]
    with new_figure(WIDTH, 4.4 if noisy else 3.2) as figure:
        axes, *below = figure.subplots(
            2 if noisy else 1, squeeze=False, sharex=True, height_ratios=[2, 1][: 1 + bool(noisy)]
        )[:, 0]
        for name, colour, history in trained:
            epochs = [row["epoch"] for row in history]
            for key, words, style, width in (("train", "training", ":", 1.4), ("validation", "held out", "-", 2.0)):
                label = f"{words}, {plain_axes(name)}" if name else words
                axes.plot(epochs, [row[key] for row in history], style, color=colour, lw=width, label=label)
        _cut_steep_start(axes, [history for _, _, history in trained])
        for panel in below:
            _plot_noise(panel, noisy)
        last = below[0] if below else axes
        last.xaxis.set_major_locator(MaxNLocator(integer=True))
        last.set_xlabel("epoch")
        axes.set_ylabel("ELBO (nats per datum)")
        figure.legend(loc="outside upper center", ncols=2)
        return figure


def _cut_steep_start(axes: Axes, histories: Sequence[History]) -> None:
    values = [row[key] for rows in histories for key in ("train", "validation") for row in rows[len(rows) // 10 :]]
    late = [value for value in values if np.isfinite(value)]
    if late and np.ptp(late) > 0:
        axes.set_ylim(min(late) - 0.02 * np.ptp(late), max(late) + 0.05 * np.ptp(late))


def _noises(history: History) -> list[str]:
    """The columns of the history that hold noise scales."""
    return [name for name in history[0] if name.startswith("noise")]


def _plot_noise(axes: Axes, trained: Sequence[tuple[str, History]]) -> None:
    for colour, history in trained:
        for name in _noises(history):
            axes.plot([row["epoch"] for row in history], [row[name] for row in history], color=colour, lw=2.0)
    axes.set_yscale("log")
    axes.set_ylabel("noise scale")

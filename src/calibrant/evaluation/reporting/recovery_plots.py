"""Pictures of recovered posteriors: concentrations beside the known ones, and coverage of caps."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np

from calibrant.evaluation.reporting.style import COLOURS, INK, WIDTH, cycled, new_figure, plain_axes

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def recovery_figure(found: Mapping[str, tuple[np.ndarray, np.ndarray, np.ndarray]], levels: np.ndarray) -> Figure:
    """Estimated beside known concentrations of single inputs, and the coverage of caps at every level.

    Args:
        found: name → known and estimated concentrations, each `(inputs,)`, and the share of known draws in caps of
            each level `(levels,)`.
        levels: share of the estimated posterior that a cap holds, `(levels,)`.

    Returns:
        A figure of matplotlib, made without pyplot.
    """
    with new_figure(WIDTH, 4.2) as figure:
        left, right = figure.subplots(1, 2)
        for place, (name, (known, own, curve)) in enumerate(found.items()):
            colour = cycled(COLOURS, place)
            left.plot(known, own, ".", ms=3, alpha=0.4, color=colour)
            right.plot(levels, curve, color=colour, label=plain_axes(name))
        ends = [min(known.min() for known, _, _ in found.values()), max(known.max() for known, _, _ in found.values())]
        left.plot(ends, ends, color=INK, lw=1)
        left.set(xlabel="known κ", ylabel="estimated κ")
        right.plot([0, 1], [0, 1], color=INK, lw=1)
        right.set(xlabel="share of the posterior in a cap", ylabel="share of known latents in the cap")
        right.legend(fontsize="small")
    return figure

"""The noise scale of a trained model, and its course during training."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from calibrant.evaluation.reporting.style import COLOURS, LINES, WIDTH, cycled, new_figure, plain_axes

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def sigma_of(model: Any) -> dict[str, float]:
    """The root mean square of a noise sd that does not depend on the latents; nothing where there is none."""
    likelihood = getattr(model, "likelihood", None)
    scale = getattr(likelihood, "scale", None)
    if scale is None:
        return {}
    return {"σ": getattr(likelihood, "unit_sd", 1.0) * float((scale.detach().double() ** 2).mean().sqrt())}


def course_figure(courses: Mapping[str, np.ndarray]) -> Figure:
    """The noise scale over epochs, one line for each name."""
    with new_figure(WIDTH, 3.2) as figure:
        axes = figure.subplots()
        for place, (name, course) in enumerate(courses.items()):
            style: dict[str, Any] = {"color": cycled(COLOURS, place), "ls": cycled(LINES, place)}
            axes.plot(np.arange(1, len(course) + 1), course, label=plain_axes(name), **style)
        axes.set(xlabel="epoch", ylabel="σ (of the largest grey value)", yscale="log")
        axes.legend()
    return figure

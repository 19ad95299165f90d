"""Pictures of responses and fields: divisive normalisation, bow ties, grids of fields."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np
import xarray as xr

from calibrant.errors import InferenceError
from calibrant.evaluation.reporting.image_plots import as_images, mosaic
from calibrant.evaluation.reporting.style import COLOURS, INK, MARKERS, WIDTH, cycled, new_figure, plain_axes

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


def divisive_figure(results: Mapping[str, xr.Dataset]) -> Figure:
    """Held-out explained variance of divisive normalisation beside that of the linear control, for several targets.

    Look whether the divisive model lies above the control beyond the error bars (two standard errors), and, on the
    right, for how many single units: each point is one, and on the diagonal division explains nothing more.

    Args:
        results: name of a target, such as "EA-VAE, exact" → result of `divisive_normalisation`.

    Returns:
        A figure of matplotlib, made without pyplot.

    Raises:
        InferenceError: for no results.
    """
    if not results:
        raise InferenceError("there is nothing to draw: give results as {name: result of divisive_normalisation}")
    with new_figure(WIDTH, 3.8) as figure:
        left, right = figure.subplots(1, 2)
        for place, result in enumerate(results.values()):
            for model, shift, filled in (("linear", -0.12, False), ("divisive", 0.12, True)):
                part, colour = result.sel(model=model), cycled(COLOURS, place)
                left.errorbar(
                    [place + shift],
                    [float(part["explained_variance"])],
                    [2 * float(part["explained_variance_se"])],
                    color=colour,
                    mfc=colour if filled else "white",
                    marker="o",
                    capsize=3,
                )
            colour, marker = cycled(COLOURS, place), cycled(MARKERS, place)
            right.plot(*result["unit_explained_variance"].values, color=colour, marker=marker, ls="", ms=4, alpha=0.7)
        left.plot([], [], color=INK, marker="o", mfc="white", ls="", label="linear control")
        left.plot([], [], color=INK, marker="o", ls="", label="divisive normalisation")
        left.set_xticks(range(len(results)), [plain_axes(name) for name in results], rotation=20, ha="right")
        left.set(ylabel="held-out explained variance", xlim=(-0.5, len(results) - 0.5))
        lowest = min(float(np.nanmin(result["unit_explained_variance"])) for result in results.values())
        ends = max(-0.5, min(0.0, lowest) - 0.05), 1.02
        right.plot(ends, ends, color=INK, lw=1.0, ls="--", label="division explains nothing more")
        right.set(xlabel="linear, each unit", ylabel="divisive, each unit", xlim=ends, ylim=ends)
        figure.legend(loc="outside upper center", ncols=3)
        return figure


def bow_tie_figure(results: Mapping[str, xr.Dataset]) -> Figure:
    """Conditional histograms of one unit's response given another's: a bow tie where they vary together.

    Look at the width of the columns: if it grows to both sides, the units' sizes depend on each other, and if all
    columns are alike, they don't. `flare` is how much wider the flanks are than the centre. Blue columns have too few
    images.

    Args:
        results: name of the responses → result of `bow_tie`.

    Returns:
        A figure of matplotlib, made without pyplot.

    Raises:
        InferenceError: for no results.
    """
    if not results:
        raise InferenceError("there is nothing to draw: give results as {name: result of bow_tie}")
    columns = min(4, len(results))
    rows = -(-len(results) // columns)
    with new_figure(WIDTH, 0.5 + rows * WIDTH / columns * 1.15) as figure:
        panels = figure.subplots(rows, columns, squeeze=False, sharex=True, sharey=True)
        for axes in panels.flat[len(results) :]:
            axes.set_axis_off()
        for axes, (name, result) in zip(panels.flat, results.items(), strict=False):
            _histogram(axes, result)
            flare, error = float(result["flare"]), float(result["flare_se"])
            axes.set_title(f"{plain_axes(name)}\nflare {flare:.0%} ± {error:.0%}")
        figure.supxlabel("response of another unit (sd by quartiles)", fontsize=11)
        figure.supylabel("response (sd by quartiles)", fontsize=11)
        return figure


def _histogram(axes: Axes, result: xr.Dataset) -> None:
    """Each column divided by its largest value, so that its width is seen where few images lie."""
    table = result["histogram"].transpose("bin", "given_bin").values
    edge = float(result["bin"].values[-1] + (result["bin"].values[1] - result["bin"].values[0]) / 2)
    shown = table / np.maximum(table.max(0), 1e-12)
    axes.set_facecolor("lightsteelblue")  # columns without enough images
    axes.imshow(shown, cmap="gray", origin="lower", extent=(-edge, edge, -edge, edge), interpolation="nearest")


def fields_figure(fields: Mapping[str, xr.DataArray], most: int = 36) -> Figure:
    """Grids of receptive or projective fields, the latents with the largest ones first, in one order for all grids.

    Each field has a grey scale of its own, on which mid-grey is zero. Look whether grids of guide and exact posterior
    show the same fields, and what images they respond to.

    Args:
        fields: name of a grid → fields `(latent, *event)`, of one source, from
            `receptive_fields` or `white_noise_fields`, or projective ones.
        most: number of fields that are shown of each grid.

    Returns:
        A figure of matplotlib, made without pyplot.

    Raises:
        InferenceError: for no fields, fields that are no images, or grids of different numbers of fields.
    """
    grids = {name: as_images(np.asarray(part.values, dtype=np.float64)) for name, part in fields.items()}
    if not grids or any(grid is None for grid in grids.values()) or len({len(part) for part in fields.values()}) > 1:
        raise InferenceError(
            f"fields of the shapes {[part.shape for part in fields.values()]}: give {{name: fields (latent, *image)}}, "
            "all of the same latents"
        )
    images = {name: grid for name, grid in grids.items() if grid is not None}
    first = next(iter(images.values()))
    order = np.argsort(-np.linalg.norm(first.reshape(len(first), -1), axis=1), kind="stable")[:most]
    columns = int(np.ceil(np.sqrt(len(order))))
    rows = -(-len(order) // columns)
    with new_figure(WIDTH, WIDTH / len(images) * rows / columns + 0.4) as figure:
        for axes, (name, grid) in zip(figure.subplots(1, len(images), squeeze=False)[0], images.items(), strict=True):
            largest = np.abs(grid[order]).reshape(len(order), -1).max(1).reshape(-1, *[1] * (grid.ndim - 1))
            shown = 0.5 + 0.5 * grid[order] / np.maximum(largest, 1e-12)
            axes.imshow(mosaic(shown, columns), cmap="gray", vmin=0.0, vmax=1.0, interpolation="nearest")
            axes.set_title(plain_axes(name))
            axes.set_axis_off()
        return figure

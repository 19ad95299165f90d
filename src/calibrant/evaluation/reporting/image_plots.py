"""Pictures of images: dictionaries, samples, the data with the largest errors."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import TYPE_CHECKING

import numpy as np

from calibrant.errors import CalibrantError
from calibrant.evaluation.reporting.run_plots import Array, scalar_draws, scores
from calibrant.evaluation.reporting.style import GUIDE, REFERENCE_FILL, WIDTH, new_figure, plain_axes
from calibrant.evaluation.results import RunResult
from calibrant.linear_gaussian.detection import detect
from calibrant.program.simulation import refuse_unsimulated, sample_prior

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


def dictionary(result: RunResult) -> Figure | None:
    """Columns of a linear decoder as images, largest norm first, up to 64 of them on one grey scale."""
    structure = detect(result.model, result.rows("observed_data", 1), result.rows("constant_data", 1))
    if structure is None:
        return None
    columns = structure.loading.cpu().numpy().T
    columns = columns[np.argsort(-np.linalg.norm(columns, axis=1), kind="stable")][:64]
    shape = result.amortized["observed_data"][structure.observed].shape[1:]
    images = as_images(columns.reshape(-1, *shape))
    if images is None:
        return None
    largest = float(np.abs(columns).max()) or 1.0
    return _pictures([("", _grey(images, -largest, largest), 16 if len(columns) > 16 else 8)])


def samples(result: RunResult, count: int = 32, seed: int = 0) -> Figure | None:
    """Observations next to prior predictive draws of the model, on one grey scale."""
    for name, observed in result.amortized["observed_data"].data_vars.items():
        images = as_images(observed.transpose("data", ...).values[:count].astype(np.float64))
        if images is None:
            continue
        try:
            drawn = _prior_predictive(result, str(name), len(images), seed)
        except CalibrantError:  # not every program can be simulated
            return None
        simulated = as_images(drawn)
        assert simulated is not None
        low, high = _limits(images)
        return _pictures([("data", _grey(images, low, high), 8), ("model", _grey(simulated, low, high), 8)])
    return None


def _prior_predictive(result: RunResult, name: str, count: int, seed: int) -> Array:
    covariates = result.rows("constant_data", count)
    refuse_unsimulated(result.model, result.rows("observed_data", count), covariates)
    return sample_prior(result.model, count, covariates, seed=seed)[name].double().cpu().numpy()


def as_images(values: Array) -> Array | None:
    """Reshape `(n, *event)` to `(n, h, w)` or `(n, h, w, 3)`; None if an event is not an image."""
    if values.ndim == 4 and values.shape[1] in (1, 3):
        values = values[:, 0] if values.shape[1] == 1 else np.moveaxis(values, 1, -1)
    image = values.ndim == 3 or (values.ndim == 4 and values.shape[-1] == 3)
    return values if image and min(values.shape[1:3]) >= 3 else None


def _limits(images: Array) -> tuple[float, float]:
    """The limits of a grey scale that ignores outliers; symmetric if the values have both signs."""
    low, high = np.quantile(images, [0.005, 0.995])
    if low < 0 < high:
        high = max(-low, high)
        low = -high
    return float(low), float(high) if high > low else float(low) + 1.0


def _grey(images: Array, low: float, high: float) -> Array:
    return np.clip((images - low) / (high - low), 0.0, 1.0)


def _pictures(panels: Sequence[tuple[str, Array, int]]) -> Figure:
    """Mosaics side by side, each given as `(title, images in [0, 1], columns)`."""
    tiles = [mosaic(images, columns) for _, images, columns in panels]
    height = WIDTH / sum(tile.shape[1] / tile.shape[0] for tile in tiles) + (
        0.35 if any(panel[0] for panel in panels) else 0.1
    )
    with new_figure(WIDTH, height) as figure:
        for axes, tile, (title, _, _) in zip(
            figure.subplots(1, len(tiles), squeeze=False)[0], tiles, panels, strict=True
        ):
            _show(axes, tile, title)
        return figure


def mosaic(images: Array, columns: int) -> Array:
    """Images `(image, h, w)` side by side on a white canvas, in rows of `columns`."""
    columns = min(columns, len(images))
    rows = -(-len(images) // columns)
    height, width = images.shape[1] + 1, images.shape[2] + 1
    canvas = np.ones((rows * height - 1, columns * width - 1, *images.shape[3:]))
    for i, image in enumerate(images):
        top, left = i // columns * height, i % columns * width
        canvas[top : top + height - 1, left : left + width - 1] = image
    return canvas


def _show(axes: Axes, picture: Array, title: str) -> None:
    axes.imshow(picture, cmap="gray", vmin=0.0, vmax=1.0, interpolation="nearest")
    axes.set_title(title)
    axes.set_axis_off()


def worst_data(result: RunResult, count: int = 3, latents: int = 3) -> Figure | None:
    """The data with the largest errors: the image, and its worst marginals, guide over reference."""
    if result.comparison is None or result.reference is None or not result.comparison.sizes["data"]:
        return None
    if not result.comparison.sizes["latent"]:
        return None
    score = scores(result.comparison)
    worst = score.max("latent").sortby(score.max("latent"), ascending=False)["data"].values[:count].tolist()
    pictures = _images_of(result, worst)
    columns = latents + (pictures is not None)
    with new_figure(WIDTH, 1.95 * len(worst) + 0.4) as figure:
        grid = figure.subplots(len(worst), columns, squeeze=False)
        for row, label in enumerate(worst):
            if pictures is not None:
                _show(grid[row, 0], pictures[row], _caption(result, label))
            of_datum = score.sel(data=label)
            chosen = of_datum.sortby(of_datum, ascending=False)["latent"].values[:latents].tolist()
            ours, theirs = (scalar_draws(tree, label, chosen) for tree in (result.amortized, result.reference))
            for axes, latent in zip(grid[row, columns - latents :], chosen, strict=False):
                _marginal(axes, theirs[latent].values.ravel(), ours[latent].values.ravel(), latent)
            first = grid[row, columns - latents]
            first.set_ylabel("density" if pictures is not None else f"{_caption(result, label)}\ndensity")
            for axes in grid[row, columns - latents + len(chosen) :]:
                axes.set_axis_off()
        handles, names = grid[0, columns - latents].get_legend_handles_labels()
        figure.legend(handles, names, loc="outside upper center", ncols=2)
        return figure


def _caption(result: RunResult, label: Hashable) -> str:
    """The label of a datum, its k-hat, and the accuracy with which a classifier tells guide from reference."""
    lines = [f"datum {plain_axes(label)}"]
    if result.weights is not None:
        lines.append(f"k-hat {float(result.weights['pareto_k'].sel(data=label)):.2f}")
    if result.comparison is not None and "c2st" in result.comparison:
        accuracy = float(result.comparison["c2st"].sel(data=label))
        lines += [f"classifier {accuracy:.0%}"] if np.isfinite(accuracy) else []
    return "\n".join(lines)


def _images_of(result: RunResult, labels: list[Hashable]) -> Array | None:
    for variable in result.amortized["observed_data"].data_vars.values():
        images = as_images(variable.sel(data=labels).transpose("data", ...).values.astype(np.float64))
        if images is not None:
            everything = as_images(variable.transpose("data", ...).values.astype(np.float64))
            assert everything is not None
            return _grey(images, *_limits(everything))
    return None


def _marginal(axes: Axes, theirs: Array, ours: Array, label: str) -> None:
    low, high = np.quantile(np.concatenate([theirs, ours]), [0.001, 0.999])
    bins = np.linspace(low, high if high > low else low + 1.0, 41).tolist()
    axes.hist(theirs, bins, density=True, histtype="stepfilled", color=REFERENCE_FILL, label="reference")
    axes.hist(ours, bins, density=True, histtype="step", color=GUIDE, lw=1.6, label="guide")
    axes.set_xlabel(plain_axes(label))
    axes.set_yticks([])

"""Whether the posterior given a second view is better than the prior of the first view alone, judged by a third."""

from __future__ import annotations

import numpy as np
import xarray as xr

from calibrant.errors import DataError
from calibrant.evaluation.representations.crossed import Variables
from calibrant.evaluation.representations.given import finite_matrix, unit_rows
from calibrant.evaluation.representations.inputs import Labels, class_numbers, image_numbers
from calibrant.evaluation.representations.neighbours import nearest_neighbours
from calibrant.evaluation.representations.second_views import second_view_posterior
from calibrant.evaluation.statistics.arrays import Array, Given
from calibrant.evaluation.statistics.counted import counted_mean
from calibrant.evaluation.statistics.resampling import bootstrap
from calibrant.progress import Progress, reporting
from calibrant.streams import stream

PRIOR = "prior"
ESTIMATES = (PRIOR, "posterior", "product", "second view", "posterior, other image")


def second_view_experiment(
    first: tuple[Given, Given],
    second: tuple[Given, Given],
    third: Given,
    k: float,
    bias: float | None = None,
    *,
    labels: Labels | None = None,
    resamples: int = 1000,
    seed: int = 0,
    progress: Progress | bool = True,
) -> xr.Dataset:
    """Compare estimates of an image's embedding, from one view and from two, with the embedding of a third view.

    Args:
        first: mean directions `(image, feature)` and concentrations `(image,)` of the first views.
        second: the same of the second views.
        third: directions of the third views, `(image, feature)`.
        k: concentration of the pair likelihood, as in `second_view_posterior`.
        bias: its bias, likewise.
        labels: class of each image, `(image,)`, for R@1 of classes.
        resamples: number of bootstrap resamples of images.
        seed: random seed for the other images and for the bootstrap.
        progress: whether bars are shown in a terminal or notebook, or a function (stage, done, total, text).

    Returns:
        Over `estimate`, with `…_se` and the ends of a 95% interval, `…_low` and `…_high`: `cosine` to the third view;
        `instance`, the share of images whose nearest third view is their own; with labels, `recall`, R@1 of the class
        among third views of other images; and each minus that of the prior on the same images, `cosine_gain`,
        `instance_gain` and `recall_gain`. Estimates: "prior", the first view's mean direction; "posterior", the
        direction of the posterior mean given that the second view is of the same object; "product", that of κμ + κ′μ′,
        as if both views were draws around one point; "second view", its mean direction; "posterior, other image", a
        control with the second view of a random other image. `information` of the posterior (image), in nats.

    Raises:
        DataError: for directions, concentrations or labels that cannot be used, or fewer than two images.
    """
    progress = reporting(progress)
    ours, theirs = (finite_matrix(side[0], "directions").astype(np.float64) for side in (first, second))
    size = len(ours)
    judge = finite_matrix(third, "third")
    if judge.shape != ours.shape or theirs.shape != ours.shape or size < 2:
        raise DataError(f"views have shapes {ours.shape}, {theirs.shape}, {judge.shape}: give three of each image")
    unit_rows(judge, "third")
    kappas = [image_numbers(side[1], size, "concentration") for side in (first, second)]
    posterior = second_view_posterior(ours, kappas[0], theirs, kappas[1], k, bias, progress)
    other = _derangement(size, stream(seed, "second_view_experiment"))
    control = second_view_posterior(ours, kappas[0], theirs[other], kappas[1][other], k, bias, progress)
    product = kappas[0][:, None] * unit_rows(ours, "first") + kappas[1][:, None] * unit_rows(theirs, "second")
    estimates = (ours, posterior["direction"].values, product, theirs, control["direction"].values)
    classes = None if labels is None else class_numbers(labels, size)
    values = np.stack([_judged(estimate, judge, classes) for estimate in estimates], 1)  # (image, estimate, statistic)
    found = bootstrap(
        counted_mean(np.concatenate([values, values - values[:, :1]], 2)), [np.arange(size)], resamples, seed
    )
    names = ["cosine", "instance", *(["recall"] if classes is not None else [])]
    variables: Variables = {"information": (("image",), posterior["information"].values)}
    for place, name in enumerate([*names, *(f"{name}_gain" for name in names)]):
        variables |= found.part(place).variables(name, ("estimate",))
    return xr.Dataset(variables, {"estimate": list(ESTIMATES)}, {"k": k, "images": size, "seed": seed})


def _derangement(size: int, seed: int) -> np.ndarray:
    """Another image for each image, at random: the next one in a random order."""
    order = np.random.default_rng(seed).permutation(size)
    other = np.empty(size, dtype=np.int64)
    other[order] = np.roll(order, 1)
    return other


def _judged(estimate: Array, third: np.ndarray, classes: np.ndarray | None) -> Array:
    """Cosine to the own third view, whether that is the nearest, and whether the nearest other one has the class."""
    every = np.arange(len(third))
    cosine = (unit_rows(estimate, "first and second together") * unit_rows(third.astype(np.float64), "third")).sum(1)
    found = [cosine, nearest_neighbours(estimate, third).index[:, 0] == every]
    if classes is not None:
        found.append(classes[nearest_neighbours(estimate, third, own=every).index[:, 0]] == classes)
    return np.stack(found, 1).astype(np.float64)

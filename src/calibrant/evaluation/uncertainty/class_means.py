"""Images of class means: what a model decodes from the average posterior mean of each class."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import combinations
from typing import Any

import numpy as np
import torch
import xarray as xr
from torch import Tensor
from torch.distributions import biject_to

from calibrant.data.dataset import Data
from calibrant.errors import InferenceError
from calibrant.evaluation.uncertainty.decoding import mean_images
from calibrant.inference.drawing import posterior_of
from calibrant.inference.problem import Problem
from calibrant.program.contract import Program
from calibrant.program.latents import Site, sites
from calibrant.progress import Progress, reporting
from calibrant.streams import stream

_TOGETHER = 1000  # images whose draws are held at a time


def class_mean_images(
    model: Program,
    guide: Program,
    observed: Mapping[str, Any] | Data,
    labels: Any,
    draws: int = 100,
    seed: int = 0,
    progress: Progress | bool = True,
) -> xr.DataArray:
    """Decode the average posterior mean of each class: the images between which a model's latents are morphed.

    Posterior means are those of the guide, on the real line: a positive scale enters by its mean logarithm, as in the
    paper (arXiv 2404.15390).

    Args:
        model: the program, with one observed site, local latents and without covariates.
        guide: its guide; both should be in `eval()`.
        observed: site → images, or a `Data`.
        labels: the class of every image, `(image,)`.
        draws: number of draws of the guide per image.
        seed: random seed for the draws.
        progress: whether bars are shown in a terminal or notebook, or a function (stage, done, total, text).

    Returns:
        Mean images `(class, *event)`, the classes in ascending order as the coordinate `class`. For binary images they
        are probabilities.

    Raises:
        InferenceError: for labels of another number than the images, shared or discrete latents, several observed sites
            or covariates, or a likelihood whose entries have no mean.
        ProgramError, DataError: for a model, guide or data that break the contract.
    """
    progress = reporting(progress)
    problem = Problem.of(model, guide, observed)
    given = np.asarray(labels.cpu() if isinstance(labels, Tensor) else labels)
    if given.shape != (len(problem.data),):
        raise InferenceError(
            f"labels have the shape {given.shape}, and there are {len(problem.data)} images: give one each"
        )
    found = _means_on_the_line(problem, _checked_sites(problem), draws, seed, progress)
    classes = np.unique(given)
    supports = {name: site.support for name, site in _checked_sites(problem).items()}
    latents = {
        name: biject_to(supports[name])(torch.stack([values[torch.as_tensor(given == one)].mean(0) for one in classes]))
        for name, values in found.items()
    }
    images = mean_images(problem.program, problem.data.observed_names[0], latents).numpy()
    return xr.DataArray(
        images, dims=("class", *(f"axis_{axis}" for axis in range(images.ndim - 1))), coords={"class": classes}
    )


def class_pairs(labels: Any, each: int = 1, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Pairs of images of different classes, `each` of every pair of classes, for `interpolation_experiment`.

    Args:
        labels: the class of every image, `(image,)`.
        each: number of pairs of images for a pair of classes; an image is taken once there.
        seed: random seed for the choice of images.

    Returns:
        Positions of the first and of the second images, ordered by classes.

    Raises:
        InferenceError: for one class only, or a class with fewer than `each` images.
    """
    given = np.asarray(labels.cpu() if isinstance(labels, Tensor) else labels)
    classes, counts = np.unique(given, return_counts=True)
    if len(classes) < 2 or each < 1 or counts.min() < each:
        raise InferenceError(
            f"{len(classes)} classes with {counts.min()} images or more, each={each}: give two classes or more, and "
            "one pair or more of classes that have as many images"
        )
    generator = np.random.default_rng(stream(seed, "class pairs"))
    of_class = [np.flatnonzero(given == one) for one in classes]
    pairs = [
        [generator.permutation(of_class[one])[:each] for one in pair] for pair in combinations(range(len(classes)), 2)
    ]
    first, second = (np.concatenate([pair[side] for pair in pairs]) for side in (0, 1))
    return first, second


def _checked_sites(problem: Problem) -> dict[str, Site]:
    """The latent sites of a problem that has one observed site and no covariates, and whose latents are continuous."""
    problem.require_local("their value is one for all classes", "to decode the local latents")
    if len(problem.data.observed_names) != 1 or problem.data.covariate_names:
        raise InferenceError(
            f"the data hold {list(problem.data.keys())}: mean images of classes need one observed site "
            "and no covariates"
        )
    found = sites(problem.program, *problem.data.batch([0]))
    if discrete := [name for name, site in found.items() if site.support.is_discrete]:
        raise InferenceError(
            f"latents {discrete} are discrete, and have no mean to decode: give a program without them"
        )
    return found


def _means_on_the_line(
    problem: Problem, found: Mapping[str, Site], draws: int, seed: int, progress: Progress
) -> dict[str, Tensor]:
    """Posterior means of every image's latents on the real line, `(image, *event)`."""
    parts: dict[str, list[Tensor]] = {name: [] for name in found}
    for block, index in enumerate(torch.arange(len(problem.data)).split(_TOGETHER)):
        tree = posterior_of(problem.of_some(problem.data[index]), draws, seed=stream(seed, "class means", block))
        for name, site in found.items():
            values = tree["posterior"][name].transpose("data", "chain", "draw", ...).values[:, 0]
            parts[name].append(biject_to(site.support).inv(torch.as_tensor(values, dtype=torch.float64)).mean(1))
        progress("class means", int(index[-1]) + 1, len(problem.data))
    return {name: torch.cat(means) for name, means in parts.items()}

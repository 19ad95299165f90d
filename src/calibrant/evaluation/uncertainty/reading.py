"""A classifier of a model's latents that reads labels from posterior draws."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
from torch import Tensor

from calibrant.data.dataset import Data
from calibrant.errors import DataError
from calibrant.evaluation.uncertainty.latents import find_sites, prior_sd_of
from calibrant.evaluation.uncertainty.moments import Array, draws_of
from calibrant.evaluation.uncertainty.read_out import Labels, ReadOut, train_read_out
from calibrant.inference.drawing import posterior_of
from calibrant.inference.problem import Problem
from calibrant.program.contract import Program
from calibrant.program.latents import sites
from calibrant.progress import Progress, reporting, silent
from calibrant.streams import stream


def label_read_out(
    model: Program,
    guide: Program,
    labelled: Mapping[str, Any] | Data,
    labels: npt.ArrayLike | Tensor,
    passes: int = 100,
    latent: str | None = None,
    seed: int = 0,
    progress: Progress | bool = True,
) -> ReadOut:
    """Train a classifier of the vector latent, in prior standard deviations, on fresh draws of the guide.

    Args:
        model: the program, with one observed site.
        guide: its guide; both should be in `eval()`.
        labelled: site → labelled images, best those of the training set, or a `Data`.
        labels: their classes, whole numbers `(image,)`.
        passes: number of passes over the images, with one fresh draw of each in every pass.
        latent: name of the vector latent, if there is more than one.
        seed: random seed for the training and the draws.
        progress: whether bars are shown in a terminal or notebook, or a function (stage, done, total, text).

    Returns:
        The classifier in its best state. Its method `probabilities` is a `read_out` of `interpolation_experiment`.

    Raises:
        DataError: for labels that are not one whole number per image, or too few images.
        ProgramError, DataError, InferenceError: for a model, guide, data or sites that cannot be used.
    """
    progress = reporting(progress)
    return label_read_out_of(Problem.of_kind(model, guide, labelled), labels, passes, latent, seed, progress)


def label_read_out_of(
    problem: Problem,
    labels: npt.ArrayLike | Tensor,
    passes: int = 100,
    latent: str | None = None,
    seed: int = 0,
    progress: Progress = silent,
) -> ReadOut:
    """Train a classifier of latents, like `label_read_out`, for a problem that is already checked."""
    data = problem.data
    given = np.asarray(labels.cpu() if isinstance(labels, Tensor) else labels)
    if given.shape != (len(data),) or given.dtype.kind not in "iuf" or (given != np.rint(given)).any():
        raise DataError(
            f"labels have shape {given.shape} and dtype {given.dtype}: give one whole number for each of the "
            f"{len(data)} images"
        )
    if len(np.unique(given)) < 2:
        raise DataError("labels hold one class: two are needed")
    if len(np.unique(given)) == len(given):
        raise DataError("labels are all different: give classes, not `Data.labels()`, which are positions")
    names, site = find_sites(sites(problem.program, *data.batch([0])), data, latent)
    unit = prior_sd_of(problem.program, site, data[: min(len(data), 16)], stream(seed, "read-out", "prior"))

    def draw(index: Labels, count: int, of_draws: int) -> Array:
        tree = posterior_of(problem.of_some(data.subset(index)), count, seed=of_draws)
        return draws_of(tree["posterior"].dataset[names.latent])[:, 0] / unit

    return train_read_out(draw, given.astype(np.int64), passes, stream(seed, "read-out"), progress)

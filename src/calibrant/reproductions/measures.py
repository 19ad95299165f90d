"""What tables of several papers measure of a trained model and its guide: numbers of a cell, with their errors."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
import xarray as xr
from torch import Tensor

from calibrant.data.dataset import Data
from calibrant.evaluation.checking import examine, judged
from calibrant.evaluation.statistics.entry_calibration import pixel_calibration_of
from calibrant.evaluation.statistics.frechet import frechet_distance
from calibrant.evaluation.statistics.mutual_information import information_of
from calibrant.evaluation.statistics.rates import rate_distortion_of
from calibrant.evaluation.statistics.usage import active_units_of
from calibrant.inference.bounds.importance_bound import iwae_bound_of
from calibrant.inference.problem import Problem
from calibrant.inference.references.sampling import ReferencePlan, reference_of
from calibrant.program.simulation import sample_prior
from calibrant.reproductions.cells import Measured
from calibrant.reproductions.context import Context
from calibrant.settings import Effort

COMPONENTS = 16  # principal components of training images, whose Fréchet distance is measured


def likelihood_of(
    context: Context, problem: Problem, draws: int, particles: int, blocks: int | None = None
) -> dict[str, Measured]:
    """Bounds on −log p(x), and the rate and distortion that they consist of, in nats per datum.

    `blocks` is the number of blocks of dependent data, see `Measured.of`.
    """
    parts = rate_distortion_of(problem, draws, context.stream("rate and distortion"))
    tighter = iwae_bound_of(problem, particles, 2, context.stream("importance-weighted bound"))
    return {
        "negative ELBO": -Measured.of(parts["elbo"], blocks),
        "negative IWAE": -Measured.of(tighter["bound"], blocks),
        "rate": Measured.of(parts["rate"], blocks),
        "distortion": Measured.of(parts["distortion"], blocks),
    }


def information_in(context: Context, problem: Problem, points: int, prior_draws: int = 20_000) -> dict[str, Any]:
    """The parts of the rate in nats: bounds on the mutual information and on the marginal KL, and the ceiling log N."""
    found = information_of(problem, points, prior_draws, context.stream("information"))
    numbers = {
        "mutual information": _measured(found, "mutual_information"),
        "marginal KL": _measured(found, "marginal_kl"),
        "marginal KL at least": Measured(float(found["classifier_kl"]), float(found["classifier_kl_se"])),
    }
    if not bool(found["split_known"]):
        numbers = {"marginal KL at least": numbers["marginal KL at least"]}
    ceilings = {"ceiling": found["ceiling"], "classifier ceiling": found["classifier_ceiling"]}
    return {**numbers, **{name: np.array([float(value)]) for name, value in ceilings.items()}}


def units_in_use(context: Context, problem: Problem) -> dict[str, float]:
    """The number of latents whose posterior mean varies over data by more than .01.

    With few draws of the guide, the error of that variance exceeds .01, and latents that are not used are counted.
    """
    return {"active units": float(active_units_of(problem, seed=context.stream("units"))["active_units"])}


def pixels_of(context: Context, problem: Problem, draws: int) -> dict[str, Any]:
    """How far the pixels' PIT, and the mass of the middle 80%, lie from those of data that the model simulates.

    Both are zero, but for chance, if the data are the model's own: the posterior has seen a pixel, so that its PIT is
    not uniform for a true model, and a distance between two samples is positive, so that its floor is subtracted.
    """
    found = pixel_calibration_of(problem, draws, seed=context.stream("pixels")).isel(observed=0)
    coverage = found.sel(level=0.8)
    more, error = coverage["coverage"] - coverage["coverage_null"], ("coverage_se", "coverage_null_se")
    return {
        "pixel PIT": Measured(float(found["difference"] - found["difference_floor"]), float(found["difference_se"])),
        "80% of pixels": Measured(float(more), math.hypot(*(float(coverage[name]) for name in error))),
        "pit": np.stack([found["pit_density"].values, found["pit_density_null"].values]),
    }


class Components:
    """The leading principal components of training images, as features of a Fréchet distance.

    Args:
        train: training data with one observation `x`.
    """

    def __init__(self, train: Data) -> None:
        images = train.tensors()[0]["x"].flatten(1).double()
        self.mean = images.mean(0)
        self.directions = torch.linalg.svd(images - self.mean, full_matrices=False)[2][:COMPONENTS]

    def __call__(self, images: Tensor) -> Tensor:
        return (images.flatten(1).double() - self.mean) @ self.directions.T


def samples_of(context: Context, problem: Problem, train: Data) -> dict[str, float]:
    """Squared Fréchet distance of as many samples of the model as there are data, and the floor between real data.

    The features are the 16 leading principal components of the training images, which have values from 0 to 1. Samples
    are cut off there, as in pictures: a Student-t may have no variance. Both are at half the sample size.
    """
    real = problem.data.tensors()[0]["x"]
    drawn = sample_prior(problem.program, len(real), seed=context.stream("samples"))["x"].cpu().clamp(0.0, 1.0)
    found = frechet_distance(real, drawn, Components(train), "principal components", seed=context.stream("halves"))
    return {"Fréchet": float(found["distance_of_halves"]), "Fréchet floor": float(found["floor"])}


def check_of(context: Context, problem: Problem, plan: ReferencePlan, effort: Effort) -> dict[str, float | Measured]:
    """A check of the guide: the numbers of its comparison with the reference, and how its questions were answered."""
    reference = reference_of(problem.program, problem.data, plan, seed=context.stream("reference"))
    result = examine(context.row, problem, reference, effort, seed=context.stream("check"))
    found = result.comparison
    kept = 0 if found is None else found["mean_error"].sizes["data"]
    answers = [verdict.status for verdict in judged(result) if verdict.primary]
    counts = {f"{status}, questions": float(answers.count(status)) for status in ("pass", "fail", "cannot tell")}
    if found is None or kept == 0:
        return {"passed the gate": 0.0, **counts}
    squares = found["mean_error"] ** 2 - found["mean_error_se"] ** 2  # without the noise of the draws
    return {
        "sd ratio": Measured.of(found["sd_ratio"].mean("latent")),
        "coverage": Measured.of(found["coverage"].mean("latent")),
        "mean error": Measured.of(squares.mean("latent").clip(min=0.0) ** 0.5),
        "passed the gate": kept / len(problem.data),
        **counts,
    }


def sds_over_contrast(curves: xr.Dataset) -> dict[str, np.ndarray]:
    """Posterior sds `(contrast, image)` in prior sds, "exact" and of the "guide", of images known at all contrasts.

    `curves` is a result of `contrast_experiment`.
    """
    sds = (curves["posterior_sd_by_image"] / curves.attrs["prior_sd"]).transpose("source", "contrast", "image")
    known = np.isfinite(sds.values).all((0, 1))
    return {
        name: sds.sel(source=source).values[:, known] for name, source in (("exact", "exact"), ("guide", "amortized"))
    }


def _measured(found: xr.Dataset, name: str) -> Measured:
    return Measured(float(found[name]), float(found[f"{name}_se"]))

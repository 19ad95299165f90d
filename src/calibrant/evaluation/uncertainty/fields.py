"""Receptive fields: which images move a latent's posterior mean."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
import xarray as xr
from torch import Tensor

from calibrant.data.dataset import Data
from calibrant.errors import InferenceError
from calibrant.evaluation.uncertainty.images import support_of
from calibrant.evaluation.uncertainty.means import MeansPlan, means_of
from calibrant.evaluation.uncertainty.moments import Array
from calibrant.evaluation.uncertainty.sources import SourcePlan
from calibrant.inference.problem import Problem
from calibrant.inference.references.sampling import structure_of
from calibrant.program.contract import Program
from calibrant.progress import Progress, reporting
from calibrant.streams import stream

_NOISE = 0.1  # sd of white noise, in units of the data's
_LOOKED_AT = 1000  # images that tell the mean and the sd of the data


def receptive_fields(
    model: Program,
    guide: Program,
    observed: Mapping[str, Any] | Data,
    draws: int = 500,
    chains: int = 4,
    reference: bool = True,
    latent: str | None = None,
    scale: str | None = None,
    seed: int = 0,
    method: str = "auto",
    progress: Progress | bool = True,
    *,
    warmup: int = 1000,
) -> xr.Dataset:
    """Receptive fields of latents: the covariance of an image and the latent's posterior mean, over images.

    For images of mean zero this is the spike-triggered average E[x μᵀ] (arXiv 2404.15390).

    Args:
        model: the program, with one observed site.
        guide: its guide; both should be in `eval()`.
        observed: site → images, or a `Data`.
        draws: number of draws per reference chain, and of guide draws per image; none where the model's posterior mean
            has a closed form.
        chains: number of reference chains.
        reference: whether the model's fields are computed; else there is the guide alone.
        latent: name of the vector latent, if there is more than one.
        scale: name of the positive scalar latent, if there is more than one.
        seed: random seed for the draws.
        method: method of `reference`.
        progress: whether bars are shown in a terminal or notebook, or a function (stage, done, total, text).
        warmup: number of adaptation steps per reference chain (MCMC only).

    Returns:
        Dimensions `source` ("exact", "amortized"), `latent`, and the axes of an image, `axis_0`, …: `field` and its
        standard error over images `field_se`, in data units times units of the latent. `images` (source), the number
        of images whose reference passes the gate.

    Raises:
        InferenceError: for sites that it cannot use, or a source with fewer than two images.
        ProgramError, DataError: for a model, guide or data that break the contract.
    """
    progress = reporting(progress)
    plan = MeansPlan(latent, scale, SourcePlan(draws, chains, warmup, method, reference))
    problem = Problem.of(model, guide, observed)
    return fields_of(means_of(problem, plan, stream(seed, "receptive fields"), progress), problem.data)


def fields_of(means: xr.Dataset, data: Data) -> xr.Dataset:
    """Receptive fields, like `receptive_fields`, from the result of `posterior_means` for the same data."""
    images = data.tensors()[0][data.observed_names[0]].double().cpu().numpy()
    flat, rows, errors, counts = images.reshape(len(images), -1), [], [], []
    for mean in means["mean"].values:
        there = np.isfinite(mean).all(1)
        if there.sum() < 2:
            raise InferenceError(
                f"the reference of {(~there).sum()} of {len(there)} images fails the gate: use more draws, another "
                "method=, or reference=False for the guide alone"
            )
        field, error = _covariance(mean[there], flat[there])
        rows.append(field)
        errors.append(error)
        counts.append(int(there.sum()))
    dims = ("source", "latent", *(f"axis_{axis}" for axis in range(images.ndim - 1)))
    shape = (len(rows), -1, *images.shape[1:])
    variables = {
        "field": (dims, np.stack(rows).reshape(shape)),
        "field_se": (dims, np.stack(errors).reshape(shape)),
        "images": ("source", np.array(counts)),
    }
    return xr.Dataset(variables, {"source": means["source"].values}, {"latent": means.attrs["latent"]})


def _covariance(means: Array, images: Array) -> tuple[Array, Array]:
    """Covariance of means `(image, latent)` and images `(image, pixel)`, and its error, `(latent, pixel)`."""
    count, first, second = len(means), means - means.mean(0), images - images.mean(0)
    found = first.T @ second / (count - 1)
    square = (first**2).T @ second**2 / count
    return found, np.sqrt(np.maximum(square - found**2, 0.0) / count)


def white_noise_fields(
    model: Program,
    guide: Program,
    observed: Mapping[str, Any] | Data,
    images: int | None = None,
    noise: float | None = None,
    draws: int = 100,
    latent: str | None = None,
    scale: str | None = None,
    seed: int = 0,
    progress: Progress | bool = True,
) -> xr.Dataset:
    """Receptive fields by white noise: the slopes of posterior means in the pixels, of the guide and of a linear model.

    White noise is shown around the average image, and posterior means are regressed on it. For a posterior mean that is
    linear in the image this is its matrix, whatever the correlations of natural images; for others, its average slope.
    `filter_responses` of these fields are the drives of `divisive_normalisation`. The model's own field is computed
    where its posterior has a closed form, or is known by quadrature.

    Args:
        model: the program, with one observed site of real values and without covariates.
        guide: its guide; both should be in `eval()`.
        observed: site → images, or a `Data`, which give average and standard deviation.
        images: number of images of noise, more than there are pixels; None for four a pixel.
        noise: standard deviation of the noise; None for a tenth of that of the data.
        draws: number of guide draws per image.
        latent: name of the vector latent, if there is more than one.
        scale: name of the positive scalar latent, if there is more than one.
        seed: random seed for the noise and the draws.
        progress: whether bars are shown in a terminal or notebook, or a function (stage, done, total, text).

    Returns:
        As `receptive_fields`, in units of the latent per data unit; without `images`.

    Raises:
        InferenceError: for data that are not real values, covariates, or too few images.
        ProgramError, DataError: for a model, guide or data that break the contract.
    """
    progress = reporting(progress)
    problem = Problem.of_kind(model, guide, observed)
    name = problem.data.observed_names[0]
    kind = support_of(problem.program, problem.data, name).kind
    if kind != "real" or problem.data.covariate_names:
        raise InferenceError(
            f"site {name!r} has {kind} values, covariates {list(problem.data.covariate_names)}: white noise needs "
            "pixels that can have any real value, and no covariates; use receptive_fields, which shows the images"
        )
    some = problem.data.batch(torch.arange(min(len(problem.data), _LOOKED_AT)))[0][name].double()
    size = _noise_images(images, some[0].numel())
    sd = float(some.std()) * _NOISE if noise is None else noise
    generator = torch.Generator().manual_seed(stream(seed, "white noise"))
    shown = sd * torch.randn((size, *some.shape[1:]), generator=generator, dtype=torch.float64)
    data = Data({name: some.mean(0) + shown})
    plan = MeansPlan(
        latent, scale, SourcePlan(draws, reference=structure_of(problem.program, problem.data) is not None)
    )
    means = means_of(problem.of_others(data), plan, stream(seed, "white noise fields"), progress)
    return _regressed(means, shown)


def _noise_images(images: int | None, pixels: int) -> int:
    found = 4 * pixels if images is None else images
    if found < 2 * pixels:
        raise InferenceError(f"images={found} of {pixels} pixels: give two images of noise a pixel or more")
    return found


def _regressed(means: xr.Dataset, shown: Tensor) -> xr.Dataset:
    """Slopes of the posterior means in the pixels, with the errors of least squares."""
    noise = shown.flatten(1).numpy()
    design = np.column_stack([np.ones(len(noise)), noise])
    inverse = np.linalg.pinv(design)
    fields, errors = [], []
    for mean in means["mean"].values:
        coefficients = inverse @ mean
        variance = ((mean - design @ coefficients) ** 2).sum(0) / (len(design) - design.shape[1])
        fields.append(coefficients[1:].T)
        errors.append(np.sqrt(variance[:, None] * (inverse[1:] ** 2).sum(1)))
    dims = ("source", "latent", *(f"axis_{axis}" for axis in range(shown.dim() - 1)))
    shape = (len(fields), -1, *shown.shape[1:])
    variables = {"field": (dims, np.reshape(fields, shape)), "field_se": (dims, np.reshape(errors, shape))}
    return xr.Dataset(variables, {"source": means["source"].values}, {"latent": means.attrs["latent"]})

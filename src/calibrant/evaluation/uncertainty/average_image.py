"""The average image: is a posterior uncertain where an image shows nothing in particular? (arXiv 2404.15390)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import torch
import xarray as xr

from calibrant.data.dataset import Data
from calibrant.errors import InferenceError
from calibrant.evaluation.uncertainty.images import support_of, uniforms_of
from calibrant.evaluation.uncertainty.latents import find_sites, prior_sd_of
from calibrant.evaluation.uncertainty.moments import mean_and_error, moments_of
from calibrant.evaluation.uncertainty.refused import is_decided, with_refused
from calibrant.evaluation.uncertainty.sources import SourcePlan, sources_of
from calibrant.inference.problem import Problem
from calibrant.program.contract import Program
from calibrant.program.latents import sites
from calibrant.progress import Progress, reporting, silent
from calibrant.streams import stream

_READ = 1024  # images that are read at a time


def average_image_experiment(
    model: Program,
    guide: Program,
    observed: Mapping[str, Any] | Data,
    images: int = 32,
    draws: int = 500,
    chains: int = 4,
    binarisations: int = 4,
    latent: str | None = None,
    scale: str | None = None,
    seed: int = 0,
    method: str = "auto",
    progress: Progress | bool = True,
    *,
    warmup: int = 1000,
) -> xr.Dataset:
    """Posterior standard deviation of the average of all images over that of single images, of model and guide.

    Args:
        model: the program, with one observed site and without covariates.
        guide: its guide; both should be in `eval()`.
        observed: site → images, or a `Data`. The average is that of all of them.
        images: number of single images, drawn at random.
        draws: number of draws per reference chain, and of guide draws per image.
        chains: number of reference chains.
        binarisations: number of times that the average of binary images is binarised; it is shown once otherwise.
        latent: name of the vector latent, if there is more than one.
        scale: name of the positive scalar latent, if there is more than one.
        seed: random seed for the choice of images and the draws.
        method: method of `reference`.
        progress: whether bars are shown in a terminal or notebook, or a function (stage, done, total, text).
        warmup: number of adaptation steps per reference chain (MCMC only).

    Returns:
        Dimension `source` ("exact", "amortized"): `average_sd`, the posterior standard deviation of the average image
        (mean over binarisations), and `images_sd`, the mean over single images, both averaged over latents and in prior
        standard deviations; `ratio` of the two. Each has `…_se`, from the draws, the binarisations and the images as a
        sample. `images_sd_by_image` (source, image), with NaN for references that fail the gate. Where references are
        refused: `images_sd_low` and `…_high`, the reference's mean with the refused images at either extreme;
        `images_sd_guide_passed` and `…_refused` ± `…_se`, the guide's. Attributes: `share_reference`, the share of
        references that pass the gate; `decided`, 1 if it is 90% or more, and that of the average image is there.

    Raises:
        InferenceError: for fewer than two images, covariates, or sites that the experiment cannot use.
        ProgramError, DataError: for a model, guide or data that break the contract.
    """
    progress = reporting(progress)
    plan = AverageImagePlan(images, binarisations, latent, scale, SourcePlan(draws, chains, warmup, method))
    return average_image_of(Problem.of_kind(model, guide, observed), plan, seed, progress)


@dataclass(frozen=True)
class AverageImagePlan:
    """The settings of the experiment with the average image: arguments of `average_image_experiment`."""

    images: int = 32
    binarisations: int = 4
    latent: str | None = None
    scale: str | None = None
    sources: SourcePlan = field(default_factory=SourcePlan)


def average_image_of(
    problem: Problem, plan: AverageImagePlan, seed: int = 0, progress: Progress = silent
) -> xr.Dataset:
    """Show the average image, like `average_image_experiment`, for a problem that is already checked."""
    data, of = problem.data, partial(stream, seed, "average image")
    if min(plan.images, len(data)) < 2 or plan.binarisations < 1 or data.covariate_names:
        raise InferenceError(
            f"images={plan.images} of {len(data)}, binarisations={plan.binarisations}, covariates "
            f"{list(data.covariate_names)}: give two images or more, one binarisation or more, and no covariates"
        )
    names, site = find_sites(sites(problem.program, *data.batch([0])), data, plan.latent, plan.scale)
    unit, average = prior_sd_of(problem.program, site, data[:2], of("prior")), _average(data, names.observed)
    support = support_of(problem.program, data, names.observed)
    times = plan.binarisations if support.kind == "binary" else 1
    repeated = average.expand(times, *average.shape[1:])
    shown = Data({names.observed: support.nearest(repeated, uniforms_of(repeated, of("uniforms")))})
    order = np.random.default_rng(of("images")).permutation(len(data))
    some = problem.of_some(data[np.sort(order[: plan.images])])
    averages = sources_of(problem.of_others(shown), plan.sources, of("average"), progress)
    singles = sources_of(some, plan.sources, of("single"), progress)
    rows: dict[str, list[Any]] = {}
    for source in averages:
        top, low = (moments_of(trees[source], names, unit=unit) for trees in (averages, singles))
        high, high_se = _mean_of_few(top.posterior_sd, top.posterior_sd_se)
        usual, usual_se = (float(value) for value in mean_and_error(low.posterior_sd))
        error = high / usual * float(np.hypot(high_se / high, usual_se / usual))
        for name, value, se in (
            ("average_sd", high, high_se),
            ("images_sd", usual, usual_se),
            ("ratio", high / usual, error),
        ):
            rows.setdefault(name, []).append(value)
            rows.setdefault(f"{name}_se", []).append(se)
        rows.setdefault("images_sd_by_image", []).append(low.posterior_sd)
    variables = {name: (("source", "image")[: np.ndim(values)], np.array(values)) for name, values in rows.items()}
    attrs: dict[str, Any] = {"seed": seed}
    if plan.sources.reference:
        exact, guide = variables["images_sd_by_image"][1]
        variables |= with_refused("images_sd", (), exact, guide, np.isfinite(exact))
        attrs["share_reference"] = float(np.isfinite([*exact, *rows["average_sd"][:1]]).mean())
        attrs["decided"] = int(is_decided(attrs["share_reference"]) and np.isfinite(rows["average_sd"][0]))
    return xr.Dataset(variables, {"source": list(averages), "image": some.data.labels()}, attrs)


def _average(data: Data, name: str) -> torch.Tensor:
    """The average of all images, `(1, *event)`."""
    parts = [data.batch(index)[0][name].double().sum(0) for index in torch.arange(len(data)).split(_READ)]
    dtype = data.batch([0])[0][name].dtype
    return (torch.stack(parts).sum(0) / len(data)).to(dtype)[None]


def _mean_of_few(values: np.ndarray, errors: np.ndarray) -> tuple[float, float]:
    """The mean of the binarisations and its error: that of the draws or that of the binarisations, the larger one."""
    of_draws = float(np.sqrt((errors**2).sum()) / len(errors))
    spread = float(values.std(ddof=1) / np.sqrt(len(values))) if len(values) > 1 else 0.0
    return float(values.mean()), max(of_draws, spread)

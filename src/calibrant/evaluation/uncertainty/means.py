"""Posterior means and variances of many images, of the model where it has a reference and of its guide."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
import xarray as xr

from calibrant.data.dataset import Data
from calibrant.evaluation.uncertainty.latents import find_sites, prior_sd_of
from calibrant.evaluation.uncertainty.moments import Array, Names, moments_of
from calibrant.evaluation.uncertainty.sources import SourcePlan, reference_draws
from calibrant.inference.drawing import posterior_of
from calibrant.inference.problem import Problem
from calibrant.inference.references.exact import solve
from calibrant.inference.references.sampling import structure_of
from calibrant.linear_gaussian.parameters import LinearGaussian
from calibrant.program.contract import Program
from calibrant.program.environment import defaults
from calibrant.program.latents import sites
from calibrant.progress import Progress, reporting, silent
from calibrant.streams import stream

_TOGETHER = 256  # images whose draws are held at a time


def posterior_means(
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
    covariates: Mapping[str, Any] | None = None,
    warmup: int = 1000,
) -> xr.Dataset:
    """Posterior means and variances of a vector latent for many images, of the model and of its guide.

    Where the posterior has a closed form, or is known by quadrature over a scale, the model's moments are computed
    without draws.

    Args:
        model: the program, with one observed site.
        guide: its guide; both should be in `eval()`.
        observed: site → images, or a `Data`.
        draws: number of draws per reference chain, and of guide draws per image.
        chains: number of reference chains.
        reference: whether the model's moments are computed; else there is the guide alone.
        latent: name of the vector latent, if there is more than one.
        scale: name of the positive scalar latent, if there is more than one.
        seed: random seed for the draws.
        method: method of `reference`.
        progress: whether bars are shown in a terminal or notebook, or a function (stage, done, total, text).
        covariates: keyword → tensor, leading dimension data.
        warmup: number of adaptation steps per reference chain (MCMC only).

    Returns:
        Dimensions `source` ("exact", "amortized"), `image` (the data's labels), `latent`: `mean`, `mean_error`, its
        Monte Carlo variance (0 for closed forms), and `variance`, all in units of the latent, NaN where a reference
        fails the gate; `prior_sd` (latent). Attributes: `latent`, `scale`.

    Raises:
        InferenceError: for sites that it cannot use, or draws of the guide that are not finite.
        ProgramError, DataError: for a model, guide or data that break the contract.
    """
    progress = reporting(progress)
    plan = MeansPlan(latent, scale, SourcePlan(draws, chains, warmup, method, reference))
    return means_of(Problem.of(model, guide, observed, covariates), plan, seed, progress)


@dataclass(frozen=True)
class MeansPlan:
    """The settings of posterior means: arguments of `posterior_means`."""

    latent: str | None = None
    scale: str | None = None
    sources: SourcePlan = field(default_factory=SourcePlan)


class _Found(NamedTuple):
    mean: Array
    mean_error: Array
    variance: Array


def means_of(problem: Problem, plan: MeansPlan, seed: int = 0, progress: Progress = silent) -> xr.Dataset:
    """Posterior means, like `posterior_means`, for a problem that is already checked."""
    data, of = problem.data, partial(stream, seed, "posterior means")
    names, site = find_sites(sites(problem.program, *data.batch([0])), data, plan.latent, plan.scale)
    structure = structure_of(problem.program, data) if plan.sources.method in ("auto", "exact") else None
    found: dict[str, list[_Found]] = {"exact": [], "amortized": []}
    for block, index in enumerate(torch.arange(len(data)).split(_TOGETHER)):
        some = problem.of_some(data[index])
        if plan.sources.reference and structure is not None:
            found["exact"].append(_solved(some, names, structure))
        elif plan.sources.reference:
            found["exact"].append(_of_draws(reference_draws(some, plan.sources, of("reference", block)), names))
        found["amortized"].append(_of_draws(posterior_of(some, plan.sources.draws, seed=of("guide", block)), names))
        progress("posterior means", int(index[-1]) + 1, len(data))
    sources = [source for source, parts in found.items() if parts]
    variables: dict[str, Any] = {
        name: (
            ("source", "image", "latent"),
            np.stack([np.concatenate([part[i] for part in found[s]]) for s in sources]),
        )
        for i, name in enumerate(_Found._fields)
    }
    variables["prior_sd"] = ("latent", prior_sd_of(problem.program, site, data[: min(len(data), 16)], of("prior")))
    attrs = {"latent": names.latent, "scale": names.scale, "seed": seed}
    return xr.Dataset(variables, {"source": sources, "image": data.labels()}, attrs)


def _solved(problem: Problem, names: Names, structure: LinearGaussian) -> _Found:
    with torch.no_grad(), defaults(problem.program, problem.data.tensors()[0], torch.float64) as place:
        solution = solve(structure, problem.data.tensors(*place)[0][structure.observed])
    mean, sd = (values[names.latent].cpu().double().flatten(1).numpy() for values in (solution.mean, solution.sd))
    return _Found(mean, np.zeros_like(mean), sd**2)


def _of_draws(tree: xr.DataTree, names: Names) -> _Found:
    moments = moments_of(tree, names)
    return _Found(moments.mean, moments.mean_error, moments.sd**2)

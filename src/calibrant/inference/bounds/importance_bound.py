"""The importance-weighted bound on the log evidence of every datum."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
import xarray as xr

from calibrant.data.dataset import Data
from calibrant.errors import InferenceError
from calibrant.inference.problem import Problem
from calibrant.inference.reweighting import MIN_DRAWS, diagnosis
from calibrant.inference.scoring import Array, at_draws, averages, mean_and_error, scored
from calibrant.inference.trees import model_sha256
from calibrant.program.contract import Program
from calibrant.progress import Progress, reporting, silent
from calibrant.streams import stream

_BLOCK = 256  # data whose weights are held at a time


def iwae_bound(
    model: Program,
    guide: Program,
    observed: Mapping[str, Any] | Data,
    particles: int = 64,
    *,
    covariates: Mapping[str, Any] | None = None,
    repeats: int = 10,
    seed: int = 0,
    progress: Progress | bool = True,
) -> xr.Dataset:
    """The bound E log 1/K Σ p(x, z_k) / q(z_k | x) ≤ log p(x) with K draws of the guide, for every datum.

    It is the ELBO for K = 1, rises with K, and reaches log p(x) as K grows (IWAE: Burda, Grosse & Salakhutdinov 2016,
    arXiv 1509.00519, equation 8). Where k-hat is large it rises slowly, and its standard error is too small, since no
    draw fell where most of the mass is.

    Args:
        model: the program, in `eval()`, without shared latents.
        guide: its guide, in `eval()`.
        observed: site → tensor, or a `Data`.
        particles: K, the number of draws in one bound.
        covariates: keyword → tensor, leading dimension data.
        repeats: number of independent bounds per datum that are averaged; their spread gives the standard error.
        seed: random seed for the draws.
        progress: whether bars are shown in a terminal or notebook, or a function (stage, done, total, text).

    Returns:
        Dimension `data`, in nats: `bound` ± `bound_se`, and `elbo` ± `elbo_se` from the same draws; `pareto_k` and
        `ess`, the k-hat and the effective number of all `particles · repeats` weights (`weights`; NaN of fewer than 100
        weights, or where some are not finite). Over the data: `average_bound` and `average_elbo`, each with `…_se`,
        the error of the data as a sample (Monte Carlo error included), and `…_mc_se`, the Monte Carlo error alone.

    Raises:
        ProgramError, DataError: for a model, guide or data that break the contract.
        InferenceError: for a program with shared latents, or for no particles, or fewer than two repeats.
    """
    progress = reporting(progress)
    problem = Problem.of(model, guide, observed, covariates)
    return iwae_bound_of(problem, particles, repeats, seed, progress)


def iwae_bound_of(
    problem: Problem, particles: int = 64, repeats: int = 10, seed: int = 0, progress: Progress = silent
) -> xr.Dataset:
    """The bound, like `iwae_bound`, for a problem that is already checked."""
    if particles < 1 or repeats < 2:
        raise InferenceError(f"particles={particles}, repeats={repeats}: give one particle or more, and two repeats")
    problem.require_local("a draw of them has one weight for all data together", "to bound the evidence of each datum")
    data = problem.data

    def weights(*given: Any) -> list[Any]:
        found = scored(*given)
        return [found.log_p.local - found.log_q.local]

    parts: list[tuple[Array, ...]] = []
    for block, index in enumerate(torch.arange(len(data), device="cpu").split(_BLOCK)):
        noise, some = stream(seed, "importance-weighted bound", block), data[index]
        (logs,) = at_draws(problem.program, problem.guide, some, particles * repeats, noise, weights)
        bounds = np.logaddexp.reduce(logs.reshape(len(some), repeats, particles), axis=2) - np.log(particles)
        parts.append((*mean_and_error(bounds), *mean_and_error(logs), *_quality(logs, some.labels())))
        progress("importance-weighted bound", int(index[-1]) + 1, len(data))
    bound, bound_se, elbo, elbo_se, khat, ess = (np.concatenate(values) for values in zip(*parts, strict=True))
    variables = {**averages("bound", bound, bound_se), **averages("elbo", elbo, elbo_se)}
    variables |= {"pareto_k": ("data", khat), "ess": ("data", ess)}
    attrs = {"particles": particles, "repeats": repeats, "seed": seed, "model_sha256": model_sha256(problem.program)}
    return xr.Dataset(variables, {"data": data.labels()}, attrs)


def _quality(logs: Array, labels: np.ndarray) -> tuple[Array, Array]:
    """k-hat and effective number of weights `(data, draw)`; NaN where they have none."""
    usable = np.isfinite(logs).all(1) & (logs.shape[1] >= MIN_DRAWS)
    khat, ess = np.full(len(logs), np.nan), np.full(len(logs), np.nan)
    if usable.any():
        known = diagnosis(logs[usable], labels[usable])
        khat[usable], ess[usable] = known["pareto_k"].values, known["ess"].values
    return khat, ess

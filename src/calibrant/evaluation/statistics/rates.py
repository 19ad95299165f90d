"""Rate and distortion: what a datum costs to describe by a guide, and what its description loses."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import xarray as xr

from calibrant.data.dataset import Data
from calibrant.errors import InferenceError
from calibrant.inference.problem import Problem
from calibrant.inference.scoring import at_draws, averages, divergence, mean_and_error, scored
from calibrant.inference.trees import model_sha256
from calibrant.program.contract import Program
from calibrant.program.latents import sites
from calibrant.program.supports import is_improper
from calibrant.progress import Progress, reporting, silent
from calibrant.streams import stream


def rate_distortion(
    model: Program,
    guide: Program,
    observed: Mapping[str, Any] | Data,
    draws: int = 100,
    *,
    covariates: Mapping[str, Any] | None = None,
    seed: int = 0,
    progress: Progress | bool = True,
) -> xr.Dataset:
    """Split the ELBO of every datum into distortion and rate: ELBO = −(distortion + rate).

        distortion = −E_q log p(x | z)          rate = KL(q(z | x) ‖ p(z))

    Models with the same ELBO can lie anywhere between a rate of zero, where the latents say nothing, and a distortion
    that is as small as the likelihood allows (Alemi et al. 2018, arXiv 1711.00464). Distortions are compared between
    models of one kind of data alone: probabilities of grey values and densities of real numbers have other units.

    The divergence of a site is taken in closed form where torch knows one and the guide draws its sites in the order of
    the program, and from the draws elsewhere. `pyro.factor` and all observed sites count as distortion.

    Args:
        model: the program, in `eval()`, without shared latents.
        guide: its guide, in `eval()`.
        observed: site → tensor, or a `Data`.
        draws: number of draws of the guide per datum.
        covariates: keyword → tensor, leading dimension data.
        seed: random seed for the draws.
        progress: whether bars are shown in a terminal or notebook, or a function (stage, done, total, text).

    Returns:
        Dimension `data`, in nats: `distortion`, `rate`, `elbo`, each with `…_se` (Monte Carlo). Over the data:
        `average_distortion`, `average_rate`, `average_elbo`, each with `…_se`, the error of the data as a sample
        (Monte Carlo error included), and `…_mc_se`, the Monte Carlo error alone.

    Raises:
        ProgramError, DataError: for a model, guide or data that break the contract.
        InferenceError: for a program with shared latents or an improper prior, or fewer than two draws.
    """
    progress = reporting(progress)
    return rate_distortion_of(Problem.of(model, guide, observed, covariates), draws, seed, progress)


def rate_distortion_of(problem: Problem, draws: int = 100, seed: int = 0, progress: Progress = silent) -> xr.Dataset:
    """Rate and distortion, like `rate_distortion`, for a problem that is already checked."""
    if draws < 2:
        raise InferenceError(f"draws={draws}: give two draws per datum or more")
    require_rates(problem)
    data = problem.data

    def terms(*given: Any) -> list[Any]:
        found = scored(*given)
        return [-found.log_p.observed, divergence(found)]

    def told(done: int) -> None:
        progress("rate and distortion", done, len(data))

    noise = stream(seed, "rate and distortion")
    distortion, rate = at_draws(problem.program, problem.guide, data, draws, noise, terms, told)
    parts = {"distortion": distortion, "rate": rate, "elbo": -(distortion + rate)}
    variables: dict[str, Any] = {}
    for name, values in parts.items():
        variables |= averages(name, *mean_and_error(values))
    attrs = {"draws": draws, "seed": seed, "model_sha256": model_sha256(problem.program)}
    return xr.Dataset(variables, {"data": data.labels()}, attrs)


def require_rates(problem: Problem) -> None:
    """Refuse a program whose data have no rate of their own.

    Raises:
        InferenceError: for shared latents, or an improper prior.
    """
    problem.require_local("no datum has a rate of its own", "to look at the rates of the local latents")
    for name, site in sites(problem.program, *problem.data.batch(torch.arange(1))).items():
        if is_improper(site.prior):
            raise InferenceError(
                f"latent {name!r} has an improper prior, from which no divergence is defined: give it a prior that "
                "integrates to one"
            )

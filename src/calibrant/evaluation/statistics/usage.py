"""Which latents a guide uses: how far its posterior means move between data."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
import xarray as xr
from torch import Tensor

from calibrant.data.dataset import Data
from calibrant.errors import InferenceError
from calibrant.inference.problem import Problem
from calibrant.inference.scoring import Array, at_draws, repeated
from calibrant.inference.trees import Latent, model_sha256
from calibrant.program.contract import Program, Values
from calibrant.program.tracing import guide_trace, latent_values
from calibrant.progress import Progress, reporting, silent
from calibrant.streams import stream

_BLOCK = 1000  # data whose draws are held at a time
THRESHOLD = 0.01  # of Burda et al., for latents of unit prior variance


def active_units(
    model: Program,
    guide: Program,
    observed: Mapping[str, Any] | Data,
    threshold: float = THRESHOLD,
    *,
    covariates: Mapping[str, Any] | None = None,
    draws: int = 100,
    seed: int = 0,
    progress: Progress | bool = True,
) -> xr.Dataset:
    """The variance of each latent's posterior mean over data, and the number of latents that are used.

    A latent is active if Var_x E_q(z | x)[z] > `threshold` (Burda, Grosse & Salakhutdinov 2016, arXiv 1509.00519,
    section 4.2); a latent that says nothing about the data has the same posterior, the prior, for all. The variance is
    in units of the latent itself, so that the usual threshold is meant for priors of variance 1.

    Means are those of draws; the part of their variance that comes from the draws is subtracted, so that the estimate
    is unbiased and may be slightly negative.

    Args:
        model: the program, in `eval()`, without shared latents.
        guide: its guide, in `eval()`.
        observed: site → tensor, or a `Data`.
        threshold: variance above which a latent is active.
        covariates: keyword → tensor, leading dimension data.
        draws: number of draws of the guide per datum.
        seed: random seed for the draws.
        progress: whether bars are shown in a terminal or notebook, or a function (stage, done, total, text).

    Returns:
        Dimension `latent` (with coordinates `site` and `index`): `variance` ± `variance_se` of the posterior mean over
        data, `posterior_variance`, the mean over data of the posterior's own, and `active`. Dimension `latent_site`:
        `active_in_site` and `units_in_site`, numbers of latents. `active_units` is the number of active ones in all.

    Raises:
        ProgramError, DataError: for a model, guide or data that break the contract.
        InferenceError: for shared latents, fewer than two draws or data, or a threshold that is not positive.
    """
    progress = reporting(progress)
    problem = Problem.of(model, guide, observed, covariates)
    return active_units_of(problem, threshold, draws, seed, progress)


def active_units_of(
    problem: Problem, threshold: float = THRESHOLD, draws: int = 100, seed: int = 0, progress: Progress = silent
) -> xr.Dataset:
    """The used latents, like `active_units`, for a problem that is already checked."""
    data = problem.data
    if draws < 2 or len(data) < 2 or not threshold > 0:
        raise InferenceError(
            f"{draws} draws of {len(data)} data, threshold={threshold}: give two draws and data or more, and a "
            "positive threshold"
        )
    problem.require_local("their posterior is one for all data", "to count the local latents")
    shapes, parts = dict[str, tuple[int, ...]](), list[tuple[Array, Array]]()

    def values(_: Program, guide: Program, observed: Values, covariates: Values, repeats: int) -> list[Tensor]:
        rows, cols = (repeated(part, repeats) for part in (observed, covariates))
        size = len(next(iter(rows.values())))
        drawn = latent_values(guide_trace(guide, rows, size, cols))
        shapes.update({name: tuple(value.shape[1:]) for name, value in drawn.items()})
        return [value.double().reshape(size, -1) for value in drawn.values()]

    for block, index in enumerate(torch.arange(len(data), device="cpu").split(_BLOCK)):
        noise = stream(seed, "active units", block)
        drawn = np.concatenate(at_draws(problem.program, problem.guide, data[index], draws, noise, values), -1)
        parts.append((drawn.mean(1), drawn.var(1, ddof=1)))
        progress("active units", int(index[-1]) + 1, len(data))
    mean, own = (np.concatenate(values) for values in zip(*parts, strict=True))
    return _summary(problem, shapes, mean, own, threshold, {"draws": draws, "seed": seed})


def _summary(
    problem: Problem,
    shapes: Mapping[str, tuple[int, ...]],
    mean: Array,
    own: Array,
    threshold: float,
    settings: Mapping[str, Any],
) -> xr.Dataset:
    """The dataset, from means and variances of the draws of every datum, `(data, latent)`."""
    size, draws = len(mean), settings["draws"]
    latents = [Latent(name, index) for name, shape in shapes.items() for index in np.ndindex(*shape)]
    terms = (mean - mean.mean(0)) ** 2 * size / (size - 1) - own / draws
    variance, active = terms.mean(0), terms.mean(0) > threshold
    sites = np.array([latent.site for latent in latents], dtype=str)
    variables = {
        "variance": ("latent", variance),
        "variance_se": ("latent", terms.std(0, ddof=1) / np.sqrt(size)),
        "posterior_variance": ("latent", own.mean(0)),
        "active": ("latent", active),
        "active_in_site": ("latent_site", np.array([active[sites == name].sum() for name in shapes])),
        "units_in_site": ("latent_site", np.array([(sites == name).sum() for name in shapes])),
        "active_units": int(active.sum()),
    }
    coords = {
        "latent": np.array([latent.label for latent in latents], dtype=str),
        "site": ("latent", sites),
        "index": ("latent", np.array([latent.position for latent in latents], dtype=str)),
        "latent_site": np.array(list(shapes), dtype=str),
    }
    attrs = {"threshold": threshold, **settings, "model_sha256": model_sha256(problem.program)}
    return xr.Dataset(variables, coords, attrs)

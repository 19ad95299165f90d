"""The powers of prior and likelihood that a guide follows.

A guide q(z | x) that was trained with the reconstruction error multiplied by t, and with the right KL divergence,
approximates the density that is proportional to p(z) p(x | z)^t. So log q is regressed on log p(z) and log p(x | z),
over the draws of each datum. Both powers are 1 for the posterior itself. A guide that is too wide by a factor f has the
power f^−2 of both. Only one that was trained for another likelihood has the power 1 of the prior and another one of the
likelihood, which is a small multiple of 1/D if an error was averaged over the D entries of an observation.
"""

from __future__ import annotations

from functools import partial

import numpy as np
import numpy.typing as npt
import torch
import xarray as xr
from torch import Tensor
from torch.distributions import Normal

from calibrant.data.dataset import Data
from calibrant.errors import InferenceError
from calibrant.guides.many_draws import encoded_before
from calibrant.inference.problem import Problem
from calibrant.program.contract import Program, Values
from calibrant.program.density import density_of
from calibrant.program.environment import defaults, in_double, seeded
from calibrant.program.supports import undressed
from calibrant.program.tracing import guide_trace, is_local, latent_values, sampled, trace
from calibrant.progress import Progress, silent
from calibrant.streams import stream

_STAGE = "powers of the guide"
_DATA, _DRAWS = 128, 64  # number of data that are looked at, and of draws of each


def powers_of(problem: Problem, seed: int = 0, progress: Progress = silent) -> xr.Dataset:
    """The powers of prior and likelihood that a guide follows, datum by datum.

    Returns:
        A dataset with dimension `data`: `prior_power` and `likelihood_power`. Attributes: numbers of `entries` of an
        observation and of `latents`, and `noise_variance`, the mean variance of Normal noise (data units squared), or
        0 for other likelihoods.

    Raises:
        InferenceError: for a program without local latents, or with shared ones.
    """
    count = min(len(problem.data), _DATA)
    data = problem.data.subset(torch.linspace(0, len(problem.data) - 1, count).round().long())
    program, guide = in_double(problem.program), in_double(problem.guide)
    with (
        torch.no_grad(),
        seeded(stream(seed, "powers")),
        defaults(problem.program, data.batch([0])[0], torch.float64) as (device, _),
    ):
        one_draw, runs = partial(_one_draw, program, guide, data, device), []
        with encoded_before(problem.guide, one_draw):
            for done in range(_DRAWS):
                progress(_STAGE, done, _DRAWS)
                runs.append(one_draw())
        progress(_STAGE, _DRAWS, _DRAWS)
        sizes = _sizes(program, data.batch([0], device, torch.float64))
    log_q, log_prior, log_likelihood = (torch.stack(terms, 1) for terms in zip(*runs, strict=True))
    found = _slopes(log_q, torch.stack([log_prior, log_likelihood], -1))
    names = ("prior_power", "likelihood_power")
    return xr.Dataset(
        {name: ("data", values) for name, values in zip(names, found.T, strict=True)},
        {"data": data.labels()},
        sizes,
    )


def _one_draw(program: Program, guide: Program, data: Data, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """log q, log prior and log likelihood of one draw per datum."""
    size = len(data)
    observed, covariates = data.batch(torch.arange(size), device, torch.float64)
    guided = guide_trace(guide, observed, size, covariates)
    values = latent_values(guided)
    if not values or not all(is_local(site) for site in sampled(guided).values()):
        raise InferenceError("the powers that a guide follows are those of local latents")
    held = {**observed, **values}
    run = trace(program, size, covariates, held)
    density = density_of(run, size, held, observed)
    return density_of(guided, size, values).local, density.latent, density.observed


def _sizes(program: Program, some: tuple[Values, Values]) -> dict[str, float]:
    """The attributes of the result, from a run of the program on one datum."""
    observed, covariates = some
    found = sampled(trace(program, 1, covariates, observed))
    sites = [found[name]["fn"] for name in observed]
    normal = all(isinstance(undressed(fn), Normal) for fn in sites)
    return {
        "entries": sum(fn.event_shape.numel() for fn in sites),
        "latents": sum(site["value"].numel() for name, site in found.items() if name not in observed),
        "noise_variance": float(torch.cat([fn.variance.flatten() for fn in sites]).mean()) if normal else 0.0,
    }


def _slopes(target: Tensor, terms: Tensor) -> npt.NDArray[np.float64]:
    """Least squares over draws: target `(data, draws)` on terms `(data, draws, 2)`, both around their means."""
    finite = (target.isfinite() & terms.isfinite().all(2)).all(1)
    centred, wanted = (part[finite] - part[finite].mean(1, keepdim=True) for part in (terms, target))
    found = torch.full((len(target), 2), torch.nan, dtype=torch.float64)
    found[finite.cpu()] = (torch.linalg.pinv(centred) @ wanted[..., None])[..., 0].cpu()
    return found.numpy()

"""The direction of a datum's latents about which its likelihood says most, and how many dimensions it informs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import pyro
import torch
import xarray as xr
from pyro.nn import PyroModule
from torch import Tensor

from calibrant.data.dataset import Data
from calibrant.errors import InferenceError
from calibrant.evaluation.statistics.joining import is_discrete
from calibrant.inference.problem import checked
from calibrant.inference.references.gate import passed_labels
from calibrant.inference.trees import Latent, data_labels, draw_blocks, latent_names, scalars
from calibrant.program.contract import Program, Values
from calibrant.program.density import density_of
from calibrant.program.environment import cast, defaults, in_double
from calibrant.program.tracing import trace
from calibrant.progress import Progress, reporting, silent

Array = npt.NDArray[np.float64]

_STAGE = "informed directions"
_DRAWS = 100  # reference draws per datum at which the likelihood is evaluated


def informed_directions(
    model: Program,
    observed: Mapping[str, Any] | Data,
    reference: xr.DataTree,
    *,
    covariates: Mapping[str, Any] | None = None,
    progress: Progress | bool = True,
) -> xr.Dataset:
    """The direction of a datum's latents about which its likelihood says most, from draws of its reference.

    The direction is the leading eigenvector of the mean of g gᵀ over the draws, with g the gradient of the log
    likelihood in units of the reference's sds. `compare` judges the guide along it.

    Args:
        model: the program, in `eval()`.
        observed: site → tensor, or a `Data`.
        reference: a tree of `inference.reference` for these data.
        covariates: keyword → tensor, leading dimension data.
        progress: whether bars are shown in a terminal or notebook, or a function (stage, done, total, text).

    Returns:
        Dimensions `data` (the data with a reference) and `latent` (continuous local latents): `direction`, unit vectors
        in units of the reference's sds, NaN where a gradient is not finite. Dimension `data`: `dimensions`, 2 Var(log
        likelihood) under the reference, which for a Normal posterior whose likelihood decides all is the number of
        latents: the number of informed dimensions.

    Raises:
        ProgramError, DataError: for a model or data that break the contract.
        InferenceError: for a reference without any of the data, or a program without continuous local latents.
    """
    progress = reporting(progress)
    return informed_of(*checked(model, observed, covariates), reference, progress)


def informed_of(program: PyroModule, data: Data, reference: xr.DataTree, progress: Progress = silent) -> xr.Dataset:
    """Like `informed_directions`, for a program and data that are already checked."""
    passed = passed_labels(reference) & set(data_labels(reference).tolist())
    kept = np.array([label in passed for label in data.labels().tolist()], dtype=bool)
    if not kept.any():
        raise InferenceError("the reference has none of the data, or no datum passes its gate")
    data, posterior = data[kept], reference["posterior"].dataset
    names = [n for n in latent_names(posterior) if "data" in posterior[n].dims and not is_discrete(posterior[n])]
    if not names:
        raise InferenceError("there is no continuous local latent along which a direction could lie")
    place = {label: i for i, label in enumerate(data_labels(reference).tolist())}
    rows = [place[label] for label in data.labels().tolist()]
    likelihood, slopes = _at_draws(program, data, posterior, rows, names, progress)
    sd = np.concatenate([block.std((1, 2)) for block in draw_blocks(posterior, names, rows)])
    direction = np.stack([_leading(slopes[:, row] * sd[row]) for row in range(len(data))])
    latents: list[Latent] = scalars(posterior, names)
    return xr.Dataset(
        {
            "direction": (("data", "latent"), direction),
            "dimensions": ("data", 2.0 * likelihood.var(0, ddof=1)),
        },
        {"data": data.labels(), "latent": np.array([latent.label for latent in latents], dtype=str)},
    )


def _leading(gradients: Array) -> Array:
    """The leading eigenvector `(latent,)` of the mean of g gᵀ over gradients `(draw, latent)`."""
    if not np.isfinite(gradients).all() or not gradients.any():
        return np.full(gradients.shape[1], np.nan)
    return np.asarray(np.linalg.svd(gradients, full_matrices=False)[2][0])


def _at_draws(
    program: PyroModule, data: Data, posterior: xr.Dataset, rows: list[int], names: list[str], progress: Progress
) -> tuple[Array, Array]:
    """Log likelihood `(draw, data)` and its gradient `(draw, data, latent)` at some reference draws.

    A run of the program takes one draw of all data, since shared latents have one value in a run. `rows` are the
    positions of the data in the reference.
    """
    double, likelihoods, slopes = in_double(program), [], []
    posterior, length = posterior[latent_names(posterior)], posterior.sizes["draw"]
    chosen = np.unique(np.linspace(0, posterior.sizes["chain"] * length - 1, _DRAWS).astype(int)).tolist()
    with pyro.validation_enabled(False), defaults(program, data.batch([0])[0], torch.float64) as where:
        observed, covariates = data.tensors(*where)
        for done, draw in enumerate(chosen):
            progress(_STAGE, done, len(chosen))
            one = posterior.isel(chain=draw // length, draw=draw % length, data=rows)
            values = cast({str(n): torch.as_tensor(value.values) for n, value in one.items()}, *where)
            likelihood, gradients = _slope(double, values, observed, covariates, names)
            likelihoods.append(likelihood.cpu().numpy())
            slopes.append(torch.cat([g.reshape(len(data), -1) for g in gradients], 1).cpu().numpy())
    progress(_STAGE, len(chosen), len(chosen))
    return np.stack(likelihoods), np.stack(slopes)


def _slope(
    program: Program, values: Values, observed: Values, covariates: Values, names: list[str]
) -> tuple[Tensor, list[Tensor]]:
    size = len(next(iter(observed.values())))
    held = {**observed, **values}
    moving = {name: held[name].detach().clone().requires_grad_() for name in names}
    with torch.enable_grad():
        run = trace(program, size, covariates, {**held, **moving})
        density = density_of(run, size, {**held, **moving}, observed)
        terms = [term for name, term in density.items() if name in density.observed_sites and term.dim()]
        local = sum(terms, torch.zeros(size))
        found = torch.autograd.grad(local.sum(), list(moving.values()), allow_unused=True)
    gradients = [torch.zeros_like(v) if g is None else g for g, v in zip(found, moving.values(), strict=True)]
    return local.detach(), gradients

"""Projective fields: how a latent moves the image."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import xarray as xr
from pyro.nn import PyroModule
from torch import Tensor

from calibrant.data.dataset import Data
from calibrant.errors import InferenceError
from calibrant.evaluation.uncertainty.decoding import mean_images
from calibrant.evaluation.uncertainty.latents import find_sites
from calibrant.inference.problem import checked
from calibrant.program.contract import Program
from calibrant.program.latents import Site, sites
from calibrant.program.simulation import sample_prior
from calibrant.streams import stream

_PRIOR_DRAWS = 20_000


def projective_fields(
    model: Program,
    observed: Mapping[str, Any] | Data,
    step: float = 1.0,
    at: Mapping[str, float] | None = None,
    latent: str | None = None,
    seed: int = 0,
) -> xr.Dataset:
    """Projective fields of latents: the change of the mean image when one latent moves by a step from its prior mean.

    Args:
        model: the program, with one observed site, local latents and without covariates.
        observed: site → images, or a `Data`; some of them show the sites.
        step: the step, in units of the latent.
        at: latent site → value of all its entries before the step; other sites have their prior mean.
        latent: name of the vector latent, if there is more than one.
        seed: random seed for simulated draws, from which prior means without a closed form are computed.

    Returns:
        Dimensions `latent` and the axes of an image, `axis_0`, …: `field`, in data units. The attribute `at` says where
        the latent sites were.

    Raises:
        InferenceError: for sites that it cannot use, or a likelihood whose entries have no mean.
        ProgramError, DataError: for a model or data that break the contract.
    """
    program, data = checked(model, observed)
    found, given = sites(program, *data.batch([0])), dict(at or {})
    names, site = find_sites({name: one for name, one in found.items() if one.event_shape.numel() > 1}, data, latent)
    if unknown := set(given) - set(found):
        raise InferenceError(f"at= names {sorted(unknown)}: the latents are {list(found)}")
    if data.covariate_names or not all(one.local for one in found.values()):
        raise InferenceError(
            f"the program has covariates {list(data.covariate_names)} or shared latents: projective fields need local "
            "latents alone, so fix the others in the program"
        )
    start = {
        name: torch.full(one.event_shape, given[name], dtype=torch.float64)
        if name in given
        else _prior_mean(program, one, stream(seed, "projective fields"))
        for name, one in found.items()
    }
    size = site.event_shape.numel()
    latents = {name: value.expand(size + 1, *value.shape).clone() for name, value in start.items()}
    latents[names.latent].reshape(size + 1, size)[1:] += step * torch.eye(size, dtype=torch.float64)
    images = mean_images(program, names.observed, latents)
    field = (images[1:] - images[0]).numpy()
    dims = ("latent", *(f"axis_{axis}" for axis in range(field.ndim - 1)))
    where = ", ".join(f"{name} = {float(value.mean()):.3g}" for name, value in start.items())
    return xr.Dataset({"field": (dims, field)}, attrs={"latent": names.latent, "step": step, "at": where})


def _prior_mean(program: PyroModule, site: Site, seed: int) -> Tensor:
    """The prior mean of a latent, `(*event)`: in closed form if its prior has no parents, else of simulated draws."""
    prior: Any = site.prior
    if not site.parents:
        try:
            return prior.mean[0].detach().double().cpu()
        except NotImplementedError:  # some families have no moments in closed form
            pass
    return sample_prior(program, _PRIOR_DRAWS, seed=seed)[site.name].double().mean(0).cpu()

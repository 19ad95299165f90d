"""The checks of a guide: does it fit its model, and does it not mix data?"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.nn import PyroModule
from torch import Tensor

from calibrant.errors import ProgramError
from calibrant.guides.adapters import check_called_as_guide
from calibrant.guides.collapsed import CollapsedGuide
from calibrant.guides.from_prior import PriorGuide
from calibrant.program.contract import Values
from calibrant.program.density import density_of
from calibrant.program.environment import cast, defaults, in_double, seeded
from calibrant.program.independence import DATA_COMPARED, check_independence
from calibrant.program.latents import few
from calibrant.program.modules import buffers_kept, check_modules, check_same_dtype
from calibrant.program.refusals import check_site
from calibrant.program.running import in_full_precision, running
from calibrant.program.supports import innermost, inside
from calibrant.program.tracing import Hold, guide_trace, is_local, latent_values, sampled, trace
from calibrant.program.weighting import refuse_weighted_latent


def check_guide(model: PyroModule, guide: PyroModule, observed: Values, covariates: Values) -> None:
    """Refuse a guide whose latents, shapes, supports or plates are not those of the model, or that is random given its
    latents or mixes data (as dropout and batch normalisation do in training mode).

    Raises:
        ProgramError: naming the site, the shape found and the shape wanted.
    """
    try:
        _check_guide(model, guide, observed, covariates)
    except ProgramError as error:
        raise ProgramError(f"the guide: {error}") from error


def _check_guide(model: PyroModule, guide: PyroModule, observed: Values, covariates: Values) -> None:
    check_called_as_guide(guide)
    check_modules(guide)
    check_same_dtype(model, guide)
    for module in guide.modules():
        if isinstance(module, CollapsedGuide):
            module.require_model(model)
    if isinstance(guide, PriorGuide):  # inside another guide, the prior of a copy of the model will do
        guide.require_model(model)
    size = len(next(iter(observed.values())))
    with torch.no_grad(), seeded(0), defaults(guide, observed) as place:
        rows, cols = cast(observed, *place), cast(covariates, *place)
        with running(f"it does not run for {size} data"), in_full_precision(), _taking_observations():
            guided = guide_trace(guide, rows, size, cols)
        latent = {n: s for n, s in sampled(trace(model, size, cols, rows)).items() if n not in observed}
    found = sampled(guided)
    if set(found) != set(latent):
        raise _sites_error(found, latent, observed)
    for name, site in found.items():
        _check_latent(name, site, latent[name], size)
    if all(is_local(site) for site in found.values()):
        _check_mixing(guide, observed, covariates, {})


@contextmanager
def _taking_observations() -> Iterator[None]:
    """Refuse a guide that fails because it takes the dict of observations for a tensor."""
    try:
        yield
    except (TypeError, AttributeError) as error:
        reason = str(error).partition("\n")[0]
        if "dict" not in reason:
            raise
        failure = f"it fails ({type(error).__name__}: {reason})"
        raise ProgramError(
            f"{failure}: a guide takes (observed, size, **covariates), where observed is a dict with a tensor per "
            "observed site"
        ) from error


def _sites_error(found: Mapping[str, Any], latent: Mapping[str, Any], observed: Values) -> ProgramError:
    start = f"it samples {sorted(found)}, the model's latents are {sorted(latent)}"
    if given := sorted(set(found) & set(observed)):
        return ProgramError(f"{start}: leave the observed sites {given} out")
    if extra := sorted(set(found) - set(latent)):
        return ProgramError(
            f"{start}: leave {extra} out; a latent made from auxiliary noise has one distribution, for example a "
            "dist.TransformedDistribution of the noise"
        )
    return ProgramError(f"{start}: sample {sorted(set(latent) - set(found))} too")


def check_local_sites(guide: PyroModule, shared: Values, observed: Values, covariates: Values) -> None:
    """Refuse a guide whose local latents depend on other data although the shared latents are fixed.

    `check_guide` allows this where a guide has shared latents, since it may be a guide of one whole data set.

    Args:
        guide: the guide.
        shared: name → value, for all shared latents.
        observed: site → tensor, leading dimension data.
        covariates: keyword → tensor, leading dimension data.

    Raises:
        ProgramError: naming the site.
    """
    try:
        _check_mixing(guide, observed, covariates, shared)
    except ProgramError as error:
        raise ProgramError(f"the guide, given its shared latents: {error}") from error


def check_trainable(guide: PyroModule, observed: Values, covariates: Values) -> None:
    """Refuse a guide whose density of the same values changes from run to run in training mode, as with dropout.

    Draws and log q would then belong to different densities. The guide is left in `eval()`.

    Raises:
        ProgramError: naming the latents.
    """
    size = len(next(iter(observed.values())))
    with torch.no_grad(), seeded(0), buffers_kept(guide.train()), defaults(guide, observed) as place:
        rows, cols = cast(observed, *place), cast(covariates, *place)
        values = latent_values(guide_trace(guide, rows, size, cols))
        first, second = (density_of(guide_trace(guide, rows, size, cols, values), size, values) for _ in range(2))
    guide.eval()
    if changed := [name for name in values if not torch.allclose(first[name], second[name], rtol=1e-4, atol=1e-4)]:
        raise ProgramError(
            f"the guide: in training mode its density of {changed} changes from run to run (dropout?), so that q is "
            "not one density: give dropout p=0 before fit; in eval() it may stay"
        )


def _check_latent(name: str, site: Mapping[str, Any], wanted: Mapping[str, Any], size: int) -> None:
    if is_local(site) != is_local(wanted):
        raise ProgramError(f"latent {name!r} is in the data plate of the model or of the guide, but not of both")
    check_site(name, site, size)
    refuse_weighted_latent(name, site)
    if isinstance(innermost(site["fn"]), dist.Delta):
        raise ProgramError(
            f"latent {name!r} is a point mass, which has no uncertainty and no density: draw it from a distribution"
        )
    if site["value"].shape != wanted["value"].shape:
        shapes = tuple(site["value"].shape), tuple(wanted["value"].shape)
        raise ProgramError(f"latent {name!r} has shape {shapes[0]}, in the model {shapes[1]}")
    if not inside(wanted["fn"], site["value"]).all():
        raise ProgramError(
            f"latent {name!r} is drawn outside the model's support {wanted['fn'].support}: choose a family on that "
            "support"
        )


def _check_mixing(guide: PyroModule, observed: Values, covariates: Values, shared: Values) -> None:
    """Refuse a guide whose density for one datum depends on other data: its draws would depend on the batch.

    Sites in `shared` are fixed and not looked at themselves.
    """
    double = in_double(guide)
    held = {name: value.double() if value.is_floating_point() else value for name, value in shared.items()}

    def program(size: int, **given: Tensor) -> None:
        with poutine.block(hide=list(held)), Hold(held):
            double({n: given[n] for n in observed}, size, **{n: given[n] for n in covariates})

    check_independence(guide, program, {}, few({**observed, **covariates}, DATA_COMPARED))

"""Training losses in the place of a log likelihood: distributions of observations that are no densities.

A distribution that says so (`is_density = False`) can be trained, and nothing else: it has no draws, no posterior and
no evidence. Of those that do not say so, one kind is found: a noise scale that is computed from the observation itself.
With σ = RMSE of the D entries of x around m, the density is proportional to ‖x − m‖^(−D), whose mass is infinite.
"""

from __future__ import annotations

from collections.abc import Iterable
from math import log

import torch
from pyro.poutine.trace_struct import Trace

from calibrant.errors import ProgramError
from calibrant.program.contract import Program, Values
from calibrant.program.environment import cast, defaults, seeded
from calibrant.program.independence import IN_DOUBLE
from calibrant.program.latents import few
from calibrant.program.running import running
from calibrant.program.supports import is_real, training_loss
from calibrant.program.tracing import TERM, sampled, trace
from calibrant.program.weighting import is_masked_at_all, is_scaled

_REMEDY = "choose a likelihood with a density"
_FAR, _FARTHER = 1e12, 1e15  # distances from the centre between which a density is compared
_SAME = 1e-3  # nats; a Student-t distribution with 1e-4 degrees of freedom falls by more than a power of −D


def refuse_losses(run: Trace) -> None:
    """Refuse a run of a program whose observations have a training loss in place of a density.

    Raises:
        ProgramError: naming the site, and the remedy that the distribution names as `instead`.
    """
    for name, site in sampled(run).items():
        if loss := training_loss(site["fn"]):
            raise ProgramError(
                f"the likelihood of site {name!r} ({type(loss).__name__}) is a training loss and no density, so that "
                f"it has no draws, posterior or evidence: {getattr(loss, 'instead', _REMEDY)}"
            )


def refuse_training_losses(model: Program, observed: Values, covariates: Values) -> None:
    """As `refuse_losses`, for a program with some of its data."""
    refuse_losses(_one_run(model, observed, covariates))


def has_training_loss(model: Program, observed: Values, covariates: Values) -> bool:
    """Whether an observation of a program has a training loss in place of a density."""
    run = _one_run(model, observed, covariates)
    return any(training_loss(site["fn"]) is not None for site in sampled(run).values())


def _one_run(model: Program, observed: Values, covariates: Values) -> Trace:
    rows, cols = few(observed, 2), few(covariates, 2)
    with torch.no_grad(), seeded(0), defaults(model, rows) as place:
        return trace(model, 2, cast(cols, *place), cast(rows, *place))


def refuse_scales_from_data(double: Program, sites: Iterable[str], observed: Values, covariates: Values) -> None:
    """Refuse observed sites whose noise scale is computed from the observation, so that their mass is infinite.

    On a ray, the density of D real entries has to fall faster than the power −D of the distance.

    Args:
        double: the program, in float64.
        sites: the observed sites.
        observed: site → tensor, leading dimension data.
        covariates: keyword → tensor, leading dimension data.

    Raises:
        ProgramError: naming the site.
    """
    size = len(next(iter(observed.values())))
    with torch.no_grad(), running(IN_DOUBLE):
        start = sampled(trace(double, size, covariates, observed))
        held = {name: site["value"] for name, site in start.items()}
        for name in sites:
            site = start[name]
            if not is_real(site["fn"]) or is_masked_at_all(site) or is_scaled(site) or training_loss(site["fn"]):
                continue
            ray = torch.randn_like(site["value"])
            terms = [
                sampled(trace(double, size, covariates, {**held, name: distance * ray}))[name][TERM]
                for distance in (_FAR, _FARTHER)
            ]
            power = ray[0].numel() * log(_FARTHER / _FAR)
            if bool(((terms[1] - terms[0] + power).abs() < _SAME).all()):
                raise ProgramError(_infinite_mass(name, ray[0].numel()))


def _infinite_mass(name: str, entries: int) -> str:
    return (
        f"the density of site {name!r} has infinite mass: far out it falls with the power −{entries} of the distance "
        f"for its {entries} entries, as with a noise scale that is computed from the observation itself. Draw a scale "
        "as a latent, or use the likelihood 'student-t-radius'. To train on it all the same, set is_density = False in "
        "the class of the distribution"
    )

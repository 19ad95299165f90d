"""Simulation: draws of the latents and data of a program, and the programs that cannot be simulated."""

from __future__ import annotations

import torch
from pyro.poutine.trace_struct import Trace
from torch import Tensor

from calibrant.errors import ProgramError, warn
from calibrant.program.contract import Program, Values, as_program, check_arguments
from calibrant.program.copied_data import covariate_with_data
from calibrant.program.environment import cast, defaults, seeded
from calibrant.program.latents import few
from calibrant.program.losses import refuse_losses
from calibrant.program.supports import is_improper
from calibrant.program.tracing import factors, messages, sampled, trace
from calibrant.program.weighting import scaled


def sample_prior(
    model: Program,
    size: int,
    covariates: Values | None = None,
    seed: int | None = None,
    *,
    values: Values | None = None,
) -> dict[str, Tensor]:
    """Draw every site of a program: latents, observations and deterministic sites.

    Draws of a site with `poutine.scale` around it follow its distribution without the scale; a warning says so.

    Args:
        model: the program.
        size: number of data.
        covariates: keyword → tensor, leading dimension `size`.
        seed: random seed for the draws; None draws from torch's global random state.
        values: site → value at which it is fixed; all other sites are drawn given these.

    Returns:
        site → tensor; local sites have leading dimension `size`.

    Raises:
        ProgramError: for a program with a factor, a likelihood that is a training loss, or an improper prior of a site
            that is drawn: none can be simulated.
        DataError: for covariates that are missing or unknown.
    """
    program, covariates, held = as_program(model), covariates or {}, values or {}
    check_arguments(program, covariates)
    with torch.no_grad(), seeded(seed), defaults(program, covariates) as place:
        run = trace(program, size, cast(covariates, *place), cast(held, *place))
    _refuse_factors(run)
    refuse_losses(run)
    drawn = {name: site for name, site in sampled(run).items() if name not in held}
    if improper := [name for name, site in drawn.items() if is_improper(site["fn"])]:
        raise ProgramError(f"site {improper[0]!r} has an improper prior: this program can't be simulated")
    if weighted := [name for name in scaled(run) if name not in held]:
        warn(f"the draws of {weighted} ignore the scale around the site")
    return {name: site["value"] for name, site in messages(run).items()}


def refuse_weights(run: Trace) -> None:
    """Refuse a run of a program with a factor, a scaled observation or a training loss, which no simulated data follow.

    Raises:
        ProgramError: naming the site.
    """
    _refuse_factors(run)
    refuse_losses(run)
    if weighted := scaled(run):
        raise ProgramError(
            f"site {weighted[0]!r} is scaled, a weighted likelihood that no draws follow: this program can't be "
            "simulated"
        )


def refuse_unsimulated(model: Program, observed: Values, covariates: Values) -> None:
    """Refuse a program that cannot be simulated: one with weights, or one that reads the observed data as a covariate.

    Args:
        model: the program.
        observed: site → tensor, leading dimension data; some of the data are enough.
        covariates: keyword → tensor, leading dimension data.

    Raises:
        ProgramError: naming the site or the covariate.
    """
    rows, cols = few(observed, 2), few(covariates, 2)
    with torch.no_grad(), seeded(0), defaults(model, rows) as place:
        refuse_weights(trace(model, 2, cast(cols, *place), cast(rows, *place)))
    if found := covariate_with_data(observed, covariates):
        raise ProgramError(
            f"the covariate {found[0]!r} holds the data of {found[1]!r}, which simulated data would keep: this program "
            "can't be simulated"
        )


def _refuse_factors(run: Trace) -> None:
    if factors(run):
        raise ProgramError(f"site {next(iter(factors(run)))!r} is a factor: this program can't be simulated")

"""Simulation: draws of the latents and data of a program."""

from __future__ import annotations

import torch
from pyro.poutine.trace_struct import Trace
from torch import Tensor

from calibrant.errors import ProgramError
from calibrant.program.contract import Program, Values, as_program, check_arguments
from calibrant.program.environment import cast, defaults, seeded
from calibrant.program.supports import is_improper
from calibrant.program.tracing import factors, messages, sampled, trace


def sample_prior(
    model: Program,
    size: int,
    covariates: Values | None = None,
    seed: int | None = None,
    *,
    values: Values | None = None,
) -> dict[str, Tensor]:
    """Draw every site of a program: latents, observations and deterministic sites.

    Args:
        model: the program.
        size: number of data.
        covariates: keyword → tensor, leading dimension `size`.
        seed: random seed for the draws; None draws from torch's global random state.
        values: site → value at which it is fixed; all other sites are drawn given these.

    Returns:
        site → tensor; local sites have leading dimension `size`.

    Raises:
        ProgramError: for a program with a factor, or with an improper prior of a site that is drawn: neither can be
            simulated.
        DataError: for covariates that are missing or unknown.
    """
    program, covariates, held = as_program(model), covariates or {}, values or {}
    check_arguments(program, covariates)
    with torch.no_grad(), seeded(seed), defaults(program, covariates) as place:
        run = trace(program, size, cast(covariates, *place), cast(held, *place))
    refuse_factors(run)
    drawn = {name: site for name, site in sampled(run).items() if name not in held}
    if improper := [name for name, site in drawn.items() if is_improper(site["fn"])]:
        raise ProgramError(f"site {improper[0]!r} has an improper prior: this program can't be simulated")
    return {name: site["value"] for name, site in messages(run).items()}


def refuse_factors(run: Trace) -> None:
    """Refuse a program with a factor: simulated data would not have the distribution that the factor implies."""
    if factors(run):
        raise ProgramError(f"site {next(iter(factors(run)))!r} is a factor: this program can't be simulated")

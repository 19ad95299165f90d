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
    model: Program, size: int, covariates: Values | None = None, seed: int | None = None
) -> dict[str, Tensor]:
    """Draw every site of a program: latents, observations and deterministic sites.

    Args:
        model: the program.
        size: number of data.
        covariates: keyword → tensor, leading dimension `size`.
        seed: random seed for the draws; None draws from torch's global random state.

    Returns:
        site → tensor; local sites have leading dimension `size`.

    Raises:
        ProgramError: for a program with an improper prior or a factor, which cannot be simulated.
        DataError: for covariates that are missing or unknown.
    """
    program, covariates = as_program(model), covariates or {}
    check_arguments(program, covariates)
    with torch.no_grad(), seeded(seed), defaults(program, covariates) as place:
        run = trace(program, size, cast(covariates, *place))
    refuse_factors(run)
    if improper := [name for name, site in sampled(run).items() if is_improper(site["fn"])]:
        raise ProgramError(f"site {improper[0]!r} has an improper prior: this program can't be simulated")
    return {name: site["value"] for name, site in messages(run).items()}


def refuse_factors(run: Trace) -> None:
    """Refuse a program with a factor: simulated data would not have the distribution that the factor implies."""
    if factors(run):
        raise ProgramError(f"site {next(iter(factors(run)))!r} is a factor: this program can't be simulated")

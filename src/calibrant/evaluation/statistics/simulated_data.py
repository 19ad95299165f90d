"""Data that a program simulates, for calibration: with local latents, and given draws of the shared ones."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from pyro.nn import PyroModule
from torch import Tensor

from calibrant.data.dataset import Data
from calibrant.errors import InferenceError
from calibrant.guides.contract import check_local_sites
from calibrant.guides.many_draws import fixed
from calibrant.inference.problem import Problem
from calibrant.program.contract import Values
from calibrant.program.density import density_of
from calibrant.program.environment import cast, defaults, seeded
from calibrant.program.latents import Site
from calibrant.program.simulation import refuse_unsimulated, sample_prior
from calibrant.program.tracing import guide_trace, latent_values
from calibrant.streams import stream

_LOOKED_AT = 256  # data that are compared with the covariates
_FEW = 4  # number of data on which a guide is run if its shared latents do not depend on the data


@dataclass(frozen=True)
class Simulated:
    """Simulated data with their local latents, in batches of rows that have the shared latents in common.

    Attributes:
        values: name → tensor, leading dimension simulation: local latents and observations.
        points: the same latents, drawn once more given the same shared latents.
        covariates: keyword → tensor, leading dimension simulation.
        shared: name → tensor, leading dimension batch; empty for a program without shared latents.
    """

    values: Values
    points: Values
    covariates: Values
    shared: Values


def refuse_unsimulated_data(program: PyroModule, data: Data) -> None:
    """Refuse a program that cannot be simulated, or not with the covariates of these data; see `refuse_unsimulated`."""
    refuse_unsimulated(program, *data.batch(torch.arange(min(len(data), _LOOKED_AT))))


def simulated_data(problem: Problem, found: Mapping[str, Site], size: int, rows: int, seed: int) -> Simulated:
    """Simulate data whose shared latents, if there are any, are drawn from the guide at the data of the problem.

    Args:
        problem: program, guide and data; covariates are drawn from the data, with replacement.
        found: the latents of the program.
        size: number of simulated data.
        rows: number of consecutive simulated data that have the same values of the shared latents.
        seed: random seed.

    Raises:
        ProgramError: for a program that can't be simulated, or a guide whose local latents depend on other data.
        InferenceError: for simulated values that are not finite.
    """
    program, data, of = problem.program, problem.data, partial(stream, seed, "calibration")
    refuse_unsimulated_data(program, data)
    chosen = np.random.default_rng(of("covariates")).integers(len(data), size=size)
    cols = data.batch(chosen)[1] if data.covariate_names else {}
    local = [name for name, site in found.items() if site.local]
    kept = [*local, *data.observed_names]
    if len(local) == len(found):
        values = simulated(program, kept, size, cols, of("truth"))
        return Simulated(values, sample_prior(program, size, cols, seed=of("points")), cols, {})
    shared = _shared_draws(problem, [name for name in found if name not in local], -(-size // rows), of("shared"))
    parts: list[tuple[Values, Values]] = []
    for batch, start in enumerate(range(0, size, rows)):
        given = {name: value[batch] for name, value in shared.items()}
        some = {name: value[start : start + rows] for name, value in cols.items()}
        count = min(rows, size - start)
        values = simulated(program, kept, count, some, of("truth", batch), given)
        points = sample_prior(program, count, some, seed=of("points", batch), values=given)
        parts.append((values, {name: points[name] for name in local}))
    values, points = ({n: torch.cat([part[which][n] for part in parts]) for n in parts[0][which]} for which in (0, 1))
    return Simulated(values, points, cols, shared)


def simulated(
    program: PyroModule, names: Iterable[str], size: int, covariates: Values, seed: int, given: Values | None = None
) -> dict[str, Tensor]:
    """Simulate the named sites, given the values of others.

    Raises:
        InferenceError: for simulated values that are not finite.
    """
    drawn = sample_prior(program, size, covariates, seed=seed, values=given)
    values = {name: drawn[name] for name in names}
    for name, value in values.items():
        finite = value.isfinite().reshape(size, -1).all(1)
        if not finite.all():
            raise InferenceError(
                f"the program simulates values of {name!r} that are not finite, {int((~finite).sum())} of {size} "
                "times: narrow the prior, or bound the values that overflow"
            )
    return values


def _shared_draws(problem: Problem, names: list[str], count: int, seed: int) -> dict[str, Tensor]:
    """Draws of the shared latents from the guide at the data, leading dimension `count`."""
    guide, data = problem.guide, problem.data
    every = data.batch(torch.arange(len(data)))
    with torch.no_grad(), seeded(seed), fixed(guide), defaults(problem.program, every[0]) as place:
        rows, cols = (cast(part, *place) for part in every)
        if not _reads_data(guide, names, rows, cols):
            rows, cols = ({name: value[:_FEW] for name, value in part.items()} for part in (rows, cols))
        size = len(next(iter(rows.values())))
        draws = [latent_values(guide_trace(guide, rows, size, cols)) for _ in range(count)]
        shared = {name: torch.stack([draw[name] for draw in draws]) for name in names}
        first = {name: value[0] for name, value in shared.items()}
    check_local_sites(guide, first, *data.batch(torch.arange(min(len(data), _FEW))))
    return shared


def _reads_data(guide: PyroModule, names: list[str], observed: Values, covariates: Values) -> bool:
    """Whether the guide's density of the shared latents depends on the data: whether it is another one for a few.

    If not, the guide need not run on all data for every draw.
    """
    few = tuple({name: value[:_FEW] for name, value in part.items()} for part in (observed, covariates))
    held: Values = {}
    terms = []
    for rows, cols in ((observed, covariates), few):
        size = len(next(iter(rows.values())))
        run = guide_trace(guide, rows, size, cols, held)
        values = latent_values(run)
        held = {name: values[name] for name in names}
        terms.append(density_of(run, size, values))
    whole, some = terms
    return any(not torch.allclose(whole[name], some[name], rtol=1e-5, atol=1e-6) for name in names)

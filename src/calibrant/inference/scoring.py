"""Draws of a guide with their log densities under program and guide, block by block, and averages of what they give."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from pyro.nn import PyroModule
from pyro.poutine.trace_struct import Trace
from torch import Tensor
from torch.distributions import kl_divergence

from calibrant.data.dataset import Data
from calibrant.guides.many_draws import encoded_once, fixed
from calibrant.memory import FEW, in_blocks, measured_rows
from calibrant.program.contract import Program, Values
from calibrant.program.density import LogDensity, density_of
from calibrant.program.environment import defaults, in_double, seeded
from calibrant.program.tracing import deterministic, guide_trace, is_local, latent_values, sampled, trace

Array = npt.NDArray[np.float64]
ROWS = 65_536  # most rows in one run of model and guide


@dataclass(frozen=True)
class Scored:
    """One draw of the guide for every row, and the deterministic sites of the program there, with log densities."""

    values: dict[str, Tensor]
    latents: list[str]
    local: list[str]
    log_p: LogDensity
    log_q: LogDensity
    program_run: Trace
    guide_run: Trace


def scored(model: Program, guide: Program, observed: Values, covariates: Values, repeats: int) -> Scored:
    """Draw once from the guide for every row, where each datum is repeated in `repeats` consecutive rows."""
    observed, covariates = (repeated(part, repeats) for part in (observed, covariates))
    size = len(next(iter(observed.values())))
    guided = guide_trace(guide, observed, size, covariates)
    latents = latent_values(guided)
    held = {**observed, **latents}
    run = trace(model, size, covariates, held)
    recorded = {name: site["value"] for name, site in deterministic(run).items()}
    local = [name for name in (*latents, *recorded) if is_local(run.nodes[name])]
    log_p, log_q = density_of(run, size, held, observed), density_of(guided, size, latents)
    return Scored({**latents, **recorded}, list(latents), local, log_p, log_q, run, guided)


def repeated(values: Values, times: int) -> dict[str, Tensor]:
    """Values whose rows are repeated, the copies of a row side by side."""
    return {name: value.repeat_interleave(times, 0) for name, value in values.items()}


def at_draws(
    program: PyroModule,
    guide: PyroModule,
    data: Data,
    draws: int,
    seed: int,
    function: Callable[[Program, Program, Values, Values, int], list[Tensor]],
    told: Callable[[int], None] = lambda done: None,
) -> list[Array]:
    """Results of a function at draws of a guide without shared latents, each `(data, draws, …)`, in float64.

    Args:
        program: the program.
        guide: its guide.
        data: the data.
        draws: number of draws per datum.
        seed: random seed for the draws.
        function: a function with the arguments of `scored` that returns tensors `(rows, …)`.
        told: called with the number of data that are done.
    """
    pair, few = (in_double(program), in_double(guide)), torch.arange(min(len(data), FEW), device="cpu")
    given = data.batch(few)[0]
    with torch.no_grad(), seeded(seed), fixed(guide), defaults(program, given, torch.float64) as (device, dtype):

        def run(index: Tensor, positions: Tensor) -> list[Tensor]:
            repeats = len(positions)
            with encoded_once(guide, repeats):
                rows = function(*pair, *data.batch(index, device, dtype), repeats)
            return [row.reshape(len(index), repeats, *row.shape[1:]).transpose(0, 1).cpu() for row in rows]

        largest = measured_rows(ROWS, len(few), lambda times: run(few, torch.arange(times)))
        found = in_blocks(run, len(data), draws, largest, told)
    return [value.transpose(0, 1).double().numpy() for value in found]


def divergence(found: Scored) -> Tensor:
    """Unbiased estimates of KL(q(z | x) ‖ p(z)) from one draw per row, `(rows,)`, in nats.

    Of each site it is the divergence in closed form, given the sites drawn before it, where torch has one and the guide
    draws its sites in the order of the program; log q − log p at the draw elsewhere.
    """
    guided = sampled(found.guide_run)
    priors = {name: site for name, site in sampled(found.program_run).items() if name in guided}
    same_order = list(priors) == list(guided)
    total = torch.zeros(found.log_q.size)
    for name, site in guided.items():
        closed = _closed_form(site, priors[name]) if same_order else None
        total = total + (found.log_q[name] - found.log_p[name] if closed is None else closed)
    return total


def _closed_form(site: Any, prior: Any) -> Tensor | None:
    try:
        found = kl_divergence(site["fn"], prior["fn"])
    except NotImplementedError:
        return None
    return found if found.shape == site["fn"].batch_shape else None


def mean_and_error(terms: Array) -> tuple[Array, Array]:
    """Means of terms `(data, draws)` over the draws, and their standard errors, which are NaN for one draw."""
    with np.errstate(invalid="ignore"):  # −∞ where a guide leaves the support
        draws = terms.shape[1]
        error = terms.std(1, ddof=1) / np.sqrt(draws) if draws > 1 else np.full(len(terms), np.nan)
        return terms.mean(1), error


def averages(name: str, value: Array, error: Array) -> dict[str, Any]:
    """Variables of a dataset: estimates `(data,)` with their Monte Carlo errors, and their average over the data.

    `NAME` ± `NAME_se` per datum. `average_NAME` over the data has two errors: `average_NAME_se` is the error of the
    data as a sample, Monte Carlo error included, and `average_NAME_mc_se` the Monte Carlo error alone.
    """
    with np.errstate(invalid="ignore"):
        spread = value.std(ddof=1) / np.sqrt(len(value)) if len(value) > 1 else np.nan
    return {
        name: ("data", value),
        f"{name}_se": ("data", error),
        f"average_{name}": value.mean(),
        f"average_{name}_se": spread,
        f"average_{name}_mc_se": np.sqrt((error**2).sum()) / len(value),
    }

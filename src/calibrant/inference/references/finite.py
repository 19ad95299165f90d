"""Exact posteriors of programs whose latents are all discrete: sums over the combinations of their values.

A program without latents has one combination, the empty one, so that its evidence is its density.
"""

from __future__ import annotations

from dataclasses import dataclass

import pyro
import torch
from pyro.nn import PyroModule
from torch import Tensor

from calibrant.data.dataset import Data
from calibrant.errors import InferenceError
from calibrant.program.contract import Program, Values
from calibrant.program.density import density_of
from calibrant.program.enumeration import ROWS, combinations, with_all_priors
from calibrant.program.environment import cast, defaults, in_double, seeded
from calibrant.program.latents import Site
from calibrant.program.tracing import deterministic, is_local, sampled, trace

_Part = tuple[Tensor, dict[str, Tensor], dict[str, Tensor]]


@dataclass(frozen=True, eq=False)
class FinitePosterior:
    """The posterior of every datum over the combinations of values of its discrete latents.

    Attributes:
        values: latent → its values in all combinations, `(combinations, *event)`.
        recorded: local deterministic site → its values, `(combinations, data, *event)`.
        constants: deterministic site outside the plate → its value.
        log_joint: log p(values, observations), `(combinations, data)`, nats, in float64.
    """

    values: dict[str, Tensor]
    recorded: dict[str, Tensor]
    constants: dict[str, Tensor]
    log_joint: Tensor

    @property
    def log_evidence(self) -> Tensor:
        """The log evidence of every datum, `(data,)`, nats."""
        return self.log_joint.logsumexp(0)

    @property
    def grid_error(self) -> Tensor:
        """The numerical error of every datum, `(data,)`, which is zero for a sum."""
        return torch.zeros_like(self.log_evidence)

    @property
    def probabilities(self) -> Tensor:
        """The posterior probability of every combination, `(combinations, data)`."""
        return self.log_joint.softmax(0)

    def sample(self, chains: int, draws: int, seed: int) -> dict[str, Tensor]:
        """Independent draws of the latents, with the deterministic sites there.

        Returns:
            site → `(chains, draws, data, *event)`, without `data` for a deterministic site outside the plate.
        """
        size, shape = self.log_joint.shape[1], (chains, draws)
        generator = torch.Generator().manual_seed(seed)
        levels = torch.rand(size, chains * draws, generator=generator, dtype=torch.float64, device="cpu")
        below = self.probabilities.T.cpu().cumsum(1)
        below = below / below[:, -1:]  # ends at 1 exactly, above every level
        chosen = torch.searchsorted(below, levels, right=True).T  # a value of probability zero is never chosen
        datum = torch.arange(size, device="cpu").expand_as(chosen)
        drawn = {name: value.cpu()[chosen] for name, value in self.values.items()}
        drawn |= {name: value.cpu()[chosen, datum] for name, value in self.recorded.items()}
        constants = {name: value.cpu().expand(*shape, *value.shape) for name, value in self.constants.items()}
        return {**{name: value.unflatten(0, shape) for name, value in drawn.items()}, **constants}


def finite_latents(program: PyroModule, data: Data) -> dict[str, Site] | None:
    """The latents of a program, without their dependencies, if all of them are discrete; None otherwise."""
    observed, covariates = data.batch(torch.arange(1, device="cpu"))
    with torch.no_grad(), seeded(0), defaults(program, observed) as place:
        run = sampled(trace(program, 1, cast(covariates, *place), cast(observed, *place)))
    latent = {name: site for name, site in run.items() if name not in observed}
    if not all(site["fn"].support.is_discrete for site in latent.values()):
        return None
    shapes = {n: s["value"].shape[1:] if is_local(s) else s["value"].shape for n, s in latent.items()}
    return {n: Site(n, s["fn"].support, shapes[n], s["fn"], is_local(s), (), ()) for n, s in latent.items()}


@torch.no_grad()
def sum_out(program: PyroModule, data: Data, discrete: dict[str, Site]) -> FinitePosterior:
    """The exact posterior of all data under a program whose latents are these `discrete` ones.

    Raises:
        InferenceError: for latents that are shared or have too many values, and for a datum without a density.
    """
    given, double = data.tensors()[0], in_double(program)
    with defaults(program, given, torch.float64) as place, pyro.validation_enabled(False):
        table = combinations(with_all_priors(discrete, double, *data.tensors(*place)))
        table = {name: value.to(place[0]) for name, value in table.items()}
        rows = max(1, ROWS // _count(table))
        index = torch.arange(len(data), device="cpu").split(rows)
        parts = [_part(double, table, *data.batch(some, *place)) for some in index]
    log_joint = torch.cat([part[0] for part in parts], 1)
    _check_density(log_joint)
    recorded = {name: torch.cat([part[1][name] for part in parts], 1) for name in parts[0][1]}
    return FinitePosterior(table, recorded, parts[0][2], log_joint)


def _count(table: Values) -> int:
    """The number of combinations: one, of nothing, where there are no latents."""
    return len(next(iter(table.values()))) if table else 1


def _part(program: Program, table: Values, observed: Values, covariates: Values) -> _Part:
    """The log joint of some data, their local deterministic sites, and those outside the plate."""
    size, count = len(next(iter(observed.values()))), _count(table)
    rows, cols = (
        {name: value.repeat(count, *[1] * (value.dim() - 1)) for name, value in part.items()}
        for part in (observed, covariates)
    )
    held = rows | {name: value.repeat_interleave(size, 0) for name, value in table.items()}
    run = trace(program, size * count, cols, held)
    found = deterministic(run)
    recorded = {n: site["value"].unflatten(0, (count, size)) for n, site in found.items() if is_local(site)}
    constants = {n: site["value"] for n, site in found.items() if not is_local(site)}
    density = density_of(run, size * count, held)
    if float(density.shared) != 0:
        raise InferenceError(
            "a site or factor outside the data plate has a density of its own, which belongs to no datum: leave it "
            "out, since it does not change the posterior of the discrete latents"
        )
    return density.local.reshape(count, size), recorded, constants


def _check_density(log_joint: Tensor) -> None:
    """Refuse data for which the sum over all values is not a positive number."""
    evidence = log_joint.logsumexp(0)
    if not evidence.isfinite().all():
        datum = int((~evidence.isfinite()).nonzero()[0])
        found = "no value of its latents has a density" if evidence[datum] == -torch.inf else "its density is infinite"
        raise InferenceError(
            f"the evidence of datum {datum} is {float(evidence[datum])} ({found}): look at the program and this datum"
        )

"""The latent sites of a program and their dependencies."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from pyro.infer.inspect import get_dependencies
from pyro.poutine.trace_struct import Trace
from torch import Tensor
from torch.distributions import constraints

from calibrant.calls import parameters_in_modules
from calibrant.program.contract import Program, Values, as_program
from calibrant.program.density import log_density
from calibrant.program.environment import cast, defaults, in_double, seeded
from calibrant.program.tracing import Hold, is_local, messages, sampled, trace


@dataclass(frozen=True)
class Site:
    """A latent site of a program.

    Attributes:
        name: name of the site.
        support: support of its distribution.
        event_shape: shape of its value, without the data dimension of a local site.
        prior: its distribution in one run of the program.
        local: whether it lies in the data plate.
        parents: the latents on which its density depends directly.
        children: the sites (latent, observed or factor) whose density depends on it directly.
    """

    name: str
    support: constraints.Constraint
    event_shape: torch.Size
    prior: dist.Distribution
    local: bool
    parents: tuple[str, ...]
    children: tuple[str, ...]


def sites(model: Program, observed: Values, covariates: Values | None = None) -> dict[str, Site]:
    """The latent sites of a program, in the order in which it samples them.

    Site b depends on site a if Pyro's provenance tracking says so, or if changing a alone changes the log density of b
    at a fixed value of b.

    Args:
        model: the program.
        observed: site → tensor, leading dimension data; all other sites are latent.
        covariates: keyword → tensor, leading dimension data.
    """
    program = as_program(model)
    rows, cols = few(observed, 8), few(covariates or {}, 8)
    size = len(next(iter(rows.values())))
    with torch.no_grad(), seeded(0):
        with defaults(program, {**rows, **cols}) as place:
            rows, cols = cast(rows, *place), cast(cols, *place)
            run = trace(program, size, cols, rows)
            latent = {name: site for name, site in sampled(run).items() if name not in rows}
            edges = _tracked_edges(program, run, size, cols, set(latent))
        edges |= _perturbed_edges(program, size, cols, rows, set(latent))
    order = list(messages(run))
    return {
        name: Site(
            name=name,
            support=site["fn"].support,
            event_shape=site["value"].shape[1:] if is_local(site) else site["value"].shape,
            prior=site["fn"],
            local=is_local(site),
            parents=tuple(p for p in order if p in latent and (p, name) in edges),
            children=tuple(c for c in order if (name, c) in edges),
        )
        for name, site in latent.items()
    }


def few(values: Values, size: int) -> dict[str, Tensor]:
    """The first `size` rows of each tensor; rows are repeated if there are fewer."""
    return {name: value[torch.arange(size, device=value.device) % len(value)] for name, value in values.items()}


def _tracked_edges(
    program: Program, run: Trace, size: int, covariates: Values, latent: set[str]
) -> set[tuple[str, str]]:
    """Dependencies that Pyro tracks, at fixed values, since some distributions (Laplace) cannot draw from tracked
    parameters."""
    values = {name: site["value"] for name, site in sampled(run).items()}
    with parameters_in_modules(), Hold(values, latent=latent):
        found: Any = get_dependencies(program, (size,), dict(covariates))["prior_dependencies"]
    return {(up, down) for down, ups in found.items() for up in ups if up != down}


def _perturbed_edges(
    program: Program, size: int, covariates: Values, observed: Values, latent: set[str], draws: int = 8
) -> set[tuple[str, str]]:
    """Dependencies found by changing one latent at a time.

    This is done in float64, where a weak dependency still changes the density, and at simulated observations every
    second time, since the given ones may be special (all zero, for example).
    """
    double, edges = in_double(program), set()
    with defaults(program, observed, torch.float64) as place:
        observed, covariates = cast(observed, *place), cast(covariates, *place)
        for draw in range(draws):
            runs = [trace(double, size, covariates, {} if draw % 2 else observed) for _ in range(2)]
            here, there = ({name: site["value"] for name, site in sampled(run).items()} for run in runs)
            with pyro.validation_enabled(False):  # changing one latent may put another outside its support: −∞ is valid
                base = log_density(double, here, size, covariates)
                for name in latent:
                    moved = log_density(double, {**here, name: there[name]}, size, covariates)
                    edges |= {(name, down) for down in base if down != name and _differ(base[down], moved[down])}
    return edges


def _differ(a: Tensor, b: Tensor) -> bool:
    return not torch.equal(torch.nan_to_num(a), torch.nan_to_num(b))

"""A program and its guide in one formula each, derived from their sites."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import pyro.distributions as dist
import torch
from pyro.nn import PyroModule
from torch import Tensor

from calibrant.errors import CalibrantError
from calibrant.program.environment import cast, defaults, seeded
from calibrant.program.latents import sites
from calibrant.program.tracing import TERM, messages, sampled, trace

_AROUND = (dist.Independent, dist.MaskedDistribution, dist.ExpandedDistribution, torch.distributions.Independent)


def model_formula(program: PyroModule, observed: Mapping[str, Tensor], covariates: Mapping[str, Tensor]) -> str:
    """The program as "s ~ LogNormal, z ~ Normal(64), x | s, z ~ Normal(1 × 16 × 16)".

    It is "" if the program does not run, or without data.

    Args:
        program: the program.
        observed: site → a few data, `(data, *event)`.
        covariates: keyword → the same data.
    """
    if not observed:
        return ""
    try:
        latent = sites(program, observed, covariates)
        with torch.no_grad(), seeded(0), defaults(program, {**observed, **covariates}) as place:
            size = len(next(iter(observed.values())))
            found = sampled(trace(program, size, cast(covariates, *place), cast(observed, *place)))
            values = {name: site["value"] for name, site in found.items()}
            given = _given(program, size, cast(covariates, *place), values, list(observed))
    except CalibrantError:
        return ""
    parents = {name: [p for p, site in latent.items() if name in site.children] for name in found}
    return ", ".join(
        _term(name, [*parents[name], *given[name]], site, name in latent and not latent[name].local)
        for name, site in found.items()
    )


def _given(
    program: PyroModule,
    size: int,
    covariates: Mapping[str, Tensor],
    values: Mapping[str, Tensor],
    observed: Sequence[str],
) -> dict[str, list[str]]:
    """Site → the covariates on which its density depends: it changes if data exchange their values.

    Covariates that are the same for all data are taken to be those of the observed sites.
    """

    def densities(given: Mapping[str, Tensor]) -> dict[str, Tensor]:
        run = messages(trace(program, size, given, values))
        return {name: run[name][TERM] for name in values}

    own, found = densities(covariates), {name: list[str]() for name in values}
    for name, value in covariates.items():
        other = densities({**covariates, name: value.roll(1, 0)})
        is_same = torch.equal(value, value.roll(1, 0))
        for site in values:
            if site in observed if is_same else not torch.equal(own[site], other[site]):
                found[site].append(name)
    return found


def _term(name: str, parents: Sequence[str], site: Mapping[str, Any], shared: bool) -> str:
    fn = site["fn"]
    while isinstance(fn, _AROUND):
        fn = fn.base_dist
    event = tuple(site["value"].shape if shared else site["value"].shape[1:])
    size = f"({shape_words(event)})" if event else ""
    given = f" | {', '.join(parents)}" if parents else ""
    return f"{name}{given} ~ {type(fn).__name__.lstrip('_')}{size}{' (shared)' if shared else ''}"


def guide_formula(spec: Mapping[str, Any]) -> str:
    """The guide that a specification describes, as "s | x ~ lognormal, z | s, x ~ normal"; "" without one."""
    seen = ", ".join(spec.get("inputs", {}))
    terms = [_head(site, seen) for site in spec.get("sites", [])]
    earlier = [site["name"] for site in spec.get("sites", [])]
    terms += [f"{name} | {', '.join([*earlier, seen])} exact" for name in spec.get("block", {})]
    return ", ".join(terms)


def _head(site: Mapping[str, Any], seen: str) -> str:
    given = [*site["parents"], *([seen] if site["local"] and seen else [])]
    return f"{site['name']}{' | ' + ', '.join(given) if given else ''} ~ {site['family'].partition('@')[0]}"


def shape_words(event: Sequence[int]) -> str:
    """A shape in words: "1 × 16 × 16"."""
    return " × ".join(str(size) for size in event)

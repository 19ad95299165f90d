"""Construction of an amortized guide from the sites of a program."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from math import expm1, log
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
from pyro.nn import PyroModule
from torch import Tensor, nn

from calibrant.binding import bind
from calibrant.data.dataset import Data
from calibrant.errors import ProgramError
from calibrant.guides.amortized import AmortizedGuide
from calibrant.guides.encoders.choosing import choice_told, default_encoder, encoder_of_a_scale, is_published, kinds_of
from calibrant.guides.encoders.inputs import set_statistics
from calibrant.guides.families.choosing import choose_family
from calibrant.guides.structure import structure_of
from calibrant.program.contract import Program
from calibrant.program.enumeration import combinations
from calibrant.program.environment import cast, defaults, seeded
from calibrant.program.latents import Site, sites
from calibrant.program.refusals import check_program
from calibrant.program.supports import is_improper
from calibrant.program.tracing import trace
from calibrant.streams import stream

if TYPE_CHECKING:
    from calibrant.guides.collapsed import CollapsedGuide
Guide: TypeAlias = "AmortizedGuide | CollapsedGuide"
_STATISTICS_ROWS = 10_000  # data from which the statistics of the inputs are computed
_PRIOR_DRAWS = 1_000  # draws from which location and scale of the prior are computed, at least
_SHARED_DRAWS, _ROWS_EACH = 200, 8  # runs, and data per run, that give the prior of a program with shared latents
_RICHER = {"full": "dense", "collapsed": "flow"}  # families in which these structures can be exact


def from_spec(spec: dict[str, Any], encoder: nn.Module | None = None, model: Program | None = None) -> Guide:
    """Build a guide from its specification, with new weights; a collapsed guide is attached to `model`, if given."""
    from calibrant.guides.collapsed import CollapsedGuide  # it is built on this module

    if spec["structure"] != "collapsed":
        return AmortizedGuide(spec, encoder)
    guide = CollapsedGuide(spec, encoder)
    return guide if model is None else guide.attach(model)


def amortize(
    model: Program,
    observed: Mapping[str, Any] | Data,
    structure: str = "faithful",
    family: str | Mapping[str, str] = "auto",
    encoder: str | Mapping[str, Any] | nn.Module | None = None,
    covariates: Mapping[str, Any] | None = None,
    seed: int = 0,
) -> Guide:
    """Build an amortized guide for the latents of a program; it starts near the prior.

    Args:
        model: the program.
        observed: the data, from which shapes and input statistics are taken; the guide stores these statistics.
        structure: which latents see which: "faithful" (a minimal structure that loses no dependency of the posterior:
            Webb et al. 2018, arXiv 1712.00287), "mean-field" (no latent sees another), "program" (order and parents of
            the program, with a top-down state that all latents share), "full" (each latent sees all earlier ones,
            through a linear regression), "collapsed" (only the distribution of a scale is learned; the latents that are
            jointly Gaussian given this scale have their exact conditional).
        family: "auto" (by support and prior; "dense" in a full structure, "flow" for the scale of a collapsed one), or
            site → name of a family, one of `calibrant.guides.FAMILIES`.
        encoder: one of `calibrant.settings.ENCODERS`, `{"name": one of these, **options}`, or input → kind, as
            `guides.encoders.choosing.make_encoder` takes them; a module `dict of inputs → (size, features)` with an
            attribute `features`; or None to choose by the shapes of the inputs, as the guide's `repr` says. With the
            published networks of the σ-VAE and the EA-VAE, "sigma-vae", "ea-vae-mlp" and "ea-vae-conv", Normal latents
            get the family "log-variance" in place of "normal", as in these papers.
        covariates: keyword → tensor, leading dimension data; the encoder sees them too.
        seed: random seed for the initial weights.

    Raises:
        ProgramError: for a shared discrete latent, a support without a family, an unknown option.
        InferenceError: for discrete latents with too many combinations of values to be summed out.
    """
    from calibrant.guides.collapsed import gaussian_block  # it is built on this module

    data = bind(model, observed, covariates)
    rows = _head_rows(data)
    program = check_program(model, *rows)
    latent = sites(program, *rows)
    seen = structure_of(structure, latent)
    block = gaussian_block(program, *rows) if structure == "collapsed" else {}
    learned = {name: parents for name, parents in seen.items() if name not in block}
    if unknown := set(family if isinstance(family, Mapping) else ()) - set(learned):
        raise ProgramError(
            f"family= names {sorted(unknown)}, which are no latents to be learned; those are {sorted(learned)}"
        )
    encoding = _encoder_spec(encoder, rows, structure)
    spec = {
        "structure": structure,
        "encoder": encoding,
        "inputs": {name: list(value.shape[1:]) for values in rows for name, value in values.items()},
        "sites": [
            _site_spec(latent[name], parents, structure, family, is_published(encoding))
            for name, parents in learned.items()
        ],
        **({"block": block, "centred": True} if block else {}),
    }
    combinations({name: site for name, site in latent.items() if site.support.is_discrete})  # refuses what fit would
    with seeded(stream(seed, "amortize")), defaults(program, rows[0]) as place:
        guide = from_spec(spec, encoder if isinstance(encoder, nn.Module) else None, program).to(*place)
        _set_statistics(guide, program, *(cast(part, *place) for part in rows))
        _narrow(guide, len(data))
    shapes = {name: tuple(value.shape[1:]) for part in rows for name, value in part.items()}
    guide.notes = choice_told(shapes) if encoder is None else ()
    return guide


def _head_rows(data: Data) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    return data.batch(torch.arange(min(len(data), _STATISTICS_ROWS)))


def _encoder_spec(
    encoder: str | Mapping[str, Any] | nn.Module | None,
    rows: tuple[dict[str, Tensor], dict[str, Tensor]],
    structure: str,
) -> str | dict[str, Any] | None:
    if isinstance(encoder, nn.Module):
        if not hasattr(encoder, "features"):
            raise ProgramError("an encoder needs an attribute `features`, the number of its outputs")
        return None
    shapes = {n: tuple(v.shape[1:]) for values in rows for n, v in values.items()}
    spec = encoder or default_encoder(shapes)
    if structure == "collapsed":
        [(name, shape)] = shapes.items()
        return encoder_of_a_scale(spec, name, shape)
    if isinstance(spec, Mapping):
        if "name" in spec and "name" not in shapes:
            return kinds_of(spec, shapes)
        return {name: dict(kind) if isinstance(kind, Mapping) else kind for name, kind in spec.items()}
    return spec


def _site_spec(
    site: Site, parents: tuple[str, ...], structure: str, family: str | Mapping[str, str], published: bool
) -> dict[str, Any]:
    if site.support.is_discrete and not site.local:
        raise ProgramError(
            f"latent {site.name!r} is discrete and shared: amortize supports only local discrete latents; sum it out "
            "in the model"
        )
    asked = family.get(site.name, "auto") if isinstance(family, Mapping) else family
    chosen = choose_family(site.name, site.support, site.prior, asked)
    if asked == "auto" and structure in _RICHER:
        with suppress(ProgramError):  # classes and directions have no covariance on the line
            chosen = choose_family(site.name, site.support, site.prior, _RICHER[structure])
    if asked == "auto" and published and site.local and chosen == "normal":
        chosen = "log-variance"
    return {
        "name": site.name,
        "event_shape": list(site.event_shape),
        "family": chosen,
        "parents": list(parents),
        "local": site.local,
    }


def _set_statistics(
    guide: Guide, program: PyroModule, observed: Mapping[str, Tensor], covariates: Mapping[str, Tensor]
) -> None:
    set_statistics(guide.encoder, {**observed, **covariates})
    is_local = {site["name"]: site["local"] for site in guide.spec["sites"]}
    size = max(_PRIOR_DRAWS, len(next(iter(observed.values()))))
    runs, rows = (1, size) if all(is_local.values()) else (_SHARED_DRAWS, _ROWS_EACH)
    draws: dict[str, list[Tensor]] = {name: [] for name in guide.order}
    for first in range(0, runs * rows, rows):
        values, given = (_rows(part, first, rows) for part in (observed, covariates))
        with torch.no_grad():
            run = trace(program, rows, given, values)
        for name in guide.order:
            if not is_improper(run.nodes[name]["fn"]):
                value: Any = run.nodes[name]["value"]
                draws[name].append(value if is_local[name] else value[None])
    for name, head in zip(guide.order, guide.heads, strict=True):
        if draws[name]:
            head.set_prior(torch.cat(draws[name]))


def _rows(values: Mapping[str, Tensor], first: int, count: int) -> dict[str, Tensor]:
    """`count` consecutive rows from `first` on, starting again at the beginning after the last row."""
    return {
        n: value[torch.arange(first, first + count, device=value.device) % len(value)] for n, value in values.items()
    }


@torch.no_grad()
def _narrow(guide: Guide, total: int) -> None:
    """Start the scales of shared latents at 1/√N times those of local ones, but no less than 1/16 times.

    All data inform a shared latent, so that its posterior is narrow. Adam is slow to reduce a scale that is much too
    wide, since it remembers the large gradients there, but quickly increases one that is too narrow.
    """
    factor = max(total**-0.5, 1 / 16)
    shift = log(expm1(0.25 * factor)) - log(expm1(0.25))  # the scales of a head are softplus of its outputs
    for site, head in zip(guide.spec["sites"], guide.heads, strict=True):
        if not site["local"]:
            count = head.family.locations
            head.out.bias[count : 2 * count] += shift  # outputs of a head are locations, then scales

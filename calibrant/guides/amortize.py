"""An amortized guide, read from the program."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, TypeAlias

import pyro
import torch
from pyro.nn import PyroModule
from torch import Tensor, nn

from calibrant.binding import bind
from calibrant.data import Data
from calibrant.errors import ProgramError
from calibrant.guides.encoders import ENCODERS, default_encoder
from calibrant.guides.families import Head, choose_family
from calibrant.program import PLATE, Program, Site, check_program, defaults, few, is_improper, seeded, sites, trace

if TYPE_CHECKING:
    from calibrant.guides.collapsed import CollapsedGuide

Guide: TypeAlias = "AmortizedGuide | CollapsedGuide"
STRUCTURES = ("faithful", "mean-field", "collapsed")
_STATISTICS_ROWS = 10_000
_PRIOR_DRAWS = 1_000


class AmortizedGuide(PyroModule):
    """q(latents | observations): an encoder, and a head for every latent site in the program's order.

    With `structure="faithful"` a head sees all earlier latents, q(scale|x) q(z|scale,x), so no dependency between the
    sites of the posterior is lost; with "mean-field" it sees none. Within a site the entries are independent.

    Args:
        spec: what rebuilds the guide without data (JSON values); `amortize` makes it.
        encoder: a module `dict of inputs → (size, features)` with an attribute `features`, in place of the one that
            the specification names.
    """

    encoder: Any
    heads: Any

    def __init__(self, spec: dict[str, Any], encoder: nn.Module | None = None) -> None:
        super().__init__()
        self.spec = spec
        shapes = {name: tuple(shape) for name, shape in spec["inputs"].items()}
        self.inputs = tuple(shapes)
        self.encoder = encoder if encoder is not None else make_encoder(spec["encoder"], shapes)
        faithful, seen = spec["structure"] == "faithful", 0
        heads = {}
        for site in spec["sites"]:
            shape = torch.Size(site["event_shape"])
            heads[site["name"]] = Head(self.encoder.features, seen if faithful else 0, shape, site["family"])
            seen += shape.numel()
        self.order, self.heads = list(heads), nn.ModuleList(heads.values())

    def forward(self, observed: Mapping[str, Tensor], size: int, **covariates: Tensor) -> None:
        given = {**observed, **covariates}
        features = self.encoder({name: given[name] for name in self.inputs})
        earlier: list[Tensor] = []
        with pyro.plate(PLATE, size):
            for name, head in zip(self.order, self.heads, strict=True):
                parents = torch.cat(earlier, -1) if head.modulation is not None else None
                value = pyro.sample(name, head(features, parents))
                earlier.append(head.to_line(value))


def from_spec(spec: dict[str, Any], encoder: nn.Module | None = None, model: Program | None = None) -> Guide:
    """The guide of a specification, with new weights; a collapsed one is attached to the model, where it is given."""
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
    encoder: str | nn.Module | None = None,
    covariates: Mapping[str, Any] | None = None,
    seed: int = 0,
) -> Guide:
    """A guide for the continuous local latents of a program; all its parameters exist at once, near the prior.

    Args:
        model: the program.
        observed: the data, for shapes and input statistics (which the guide keeps).
        structure: "faithful", "mean-field", or "collapsed" (the exact conditional of the latents that are jointly
            Gaussian given a scale, which alone is learned).
        family: "auto" (the prior's own family, else by support), or a family by site: "normal", "laplace",
            "lognormal", "gamma".
        encoder: "mlp", "conv", a module `dict of inputs → (size, features)` with an attribute `features`, or None for
            a choice by shape.
        covariates: keyword → tensor; the encoder sees them too.
        seed: of the first weights.

    Raises:
        ProgramError: for a shared or discrete latent, a support without a family, an unknown option.
    """
    from calibrant.guides.collapsed import gaussian_block  # it is built on this module

    if structure not in STRUCTURES:
        raise ProgramError(f"unknown structure {structure!r}; known: {STRUCTURES}")
    rows = _head_rows(bind(model, observed, covariates))
    program = check_program(model, *rows)
    latent = sites(program, *rows)
    block = gaussian_block(program, *rows) if structure == "collapsed" else {}
    learned = [site for name, site in latent.items() if name not in block]
    if unknown := set(family if isinstance(family, Mapping) else ()) - {site.name for site in learned}:
        known = sorted(site.name for site in learned)
        raise ProgramError(f"family= names {sorted(unknown)}, which are no latents to be learned; those are {known}")
    spec = {
        "structure": structure,
        "encoder": _encoder_name(encoder, rows),
        "inputs": {name: list(value.shape[1:]) for values in rows for name, value in values.items()},
        "sites": [_site_spec(site, family) for site in learned],
        **({"block": block} if block else {}),
    }
    with seeded(seed), defaults(program, rows[0]) as (device, dtype):
        guide = from_spec(spec, encoder if isinstance(encoder, nn.Module) else None, program).to(device, dtype)
        _set_statistics(guide, program, *rows)
    return guide


def _head_rows(data: Data) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    return data.batch(torch.arange(min(len(data), _STATISTICS_ROWS)))


def make_encoder(name: str | None, shapes: dict[str, tuple[int, ...]]) -> nn.Module:
    """A new encoder by the name that a specification has for it."""
    if name is None:
        raise ProgramError("this guide was made with an encoder of yours: give it again, encoder=")
    if name not in ENCODERS:
        raise ProgramError(f"unknown encoder {name!r}; known: {sorted(ENCODERS)}, or a module of your own")
    return ENCODERS[name](shapes)


def _encoder_name(encoder: str | nn.Module | None, rows: tuple[dict[str, Tensor], dict[str, Tensor]]) -> str | None:
    if isinstance(encoder, nn.Module):
        if not hasattr(encoder, "features"):
            raise ProgramError("an encoder tells the number of its outputs in its attribute `features`")
        return None
    return encoder or default_encoder({n: tuple(v.shape[1:]) for values in rows for n, v in values.items()})


def _site_spec(site: Site, family: str | Mapping[str, str]) -> dict[str, Any]:
    if not site.local:
        raise ProgramError(
            f"latent {site.name!r} is shared: amortize takes local latents alone; write its guide by hand"
        )
    if site.support.is_discrete:
        raise ProgramError(f"latent {site.name!r} is discrete: amortize takes continuous latents alone")
    asked = family.get(site.name, "auto") if isinstance(family, Mapping) else family
    return {
        "name": site.name,
        "event_shape": list(site.event_shape),
        "family": choose_family(site.name, site.support, site.prior, asked),
    }


def _set_statistics(
    guide: Guide, program: PyroModule, observed: Mapping[str, Tensor], covariates: Mapping[str, Tensor]
) -> None:
    if hasattr(guide.encoder, "inputs"):
        guide.encoder.inputs.set_statistics({**observed, **covariates})
    size = max(_PRIOR_DRAWS, len(next(iter(observed.values()))))
    with torch.no_grad():
        run = trace(program, size, few(covariates, size), few(observed, size))
    for name, head in zip(guide.order, guide.heads, strict=True):
        if not is_improper(run.nodes[name]["fn"]):
            head.set_prior(run.nodes[name]["value"])

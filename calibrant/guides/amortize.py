"""An amortized guide, read from the program."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from math import expm1, log
from typing import TYPE_CHECKING, Any, TypeAlias

import pyro
import pyro.distributions as dist
import torch
from pyro.nn import PyroModule
from torch import Tensor, nn
from torch.distributions import constraints, kl_divergence, register_kl

from calibrant.binding import bind
from calibrant.data import Data
from calibrant.errors import ProgramError
from calibrant.guides.encoders import default_encoder, encoder_of_a_scale, make_encoder, set_statistics
from calibrant.guides.families import Head, Modulation, choose_family
from calibrant.guides.structure import structure_of
from calibrant.program import (
    PLATE,
    Program,
    Site,
    cast,
    check_program,
    defaults,
    is_improper,
    seeded,
    sites,
    trace,
)

if TYPE_CHECKING:
    from calibrant.guides.collapsed import CollapsedGuide

Guide: TypeAlias = "AmortizedGuide | CollapsedGuide"
_STATISTICS_ROWS = 10_000
_PRIOR_DRAWS = 1_000
_SHARED_DRAWS, _ROWS_EACH = 200, 8  # of a program with shared latents: runs for its prior, and data in each
_CONSTANTS = 32  # features of a shared latent's head: what its parents modulate
_STATE = 128  # width of the top-down state
_RICHER = {"full": "dense", "collapsed": "flow"}  # what nothing but the family keeps from being exact


class AmortizedGuide(PyroModule):
    """q(latents | observations): an encoder, and a head for every latent site, in the order of a structure.

    A local latent's head sees the encoder's features and the latents that the structure names (`guides/structure.py`).
    A shared latent's distribution is learned: its head sees no data, which come in minibatches, but the shared latents
    that the structure names; it is drawn once, outside the data plate. With the structure "program", one top-down state
    runs from latent to latent, changed by each in turn, and local heads see it beside the features (as hierarchical
    VAEs do: Sønderby et al. 2016, arXiv 1602.02282).

    Args:
        spec: what rebuilds the guide without data (JSON values); `amortize` makes it.
        encoder: a module `dict of inputs → (size, features)` with an attribute `features`, in place of the one that
            the specification names.
    """

    encoder: Any
    heads: Any
    constant: Tensor

    def __init__(self, spec: dict[str, Any], encoder: nn.Module | None = None) -> None:
        super().__init__()
        self.spec = spec
        shapes = {name: tuple(shape) for name, shape in spec["inputs"].items()}
        self.inputs = tuple(shapes)
        local = [site["name"] for site in spec["sites"] if site["local"]]
        self.encoder = None
        if local:
            self.encoder = encoder if encoder is not None else encoder_of(spec)
        has_state = spec["structure"] == "program" and bool(local)
        heads: dict[str, Head] = {}
        for site in spec["sites"]:
            features = self.encoder.features + _STATE * has_state if site["local"] else _constants(site)
            seen = sum(heads[parent].width_on_line for parent in site["parents"])
            heads[site["name"]] = Head(
                features,
                seen,
                torch.Size(site["event_shape"]),
                site["family"],
                regression=spec["structure"] == "full",
            )
        self.order, self.heads = list(heads), nn.ModuleList(heads.values())
        widths = [heads[name].width_on_line for name in self.order[:-1]]  # nobody comes after the last
        self.top_down = TopDown(self.encoder.features, widths) if has_state else None
        self.register_buffer("constant", torch.ones(1, _CONSTANTS), persistent=False)

    def forward(self, observed: Mapping[str, Tensor], size: int, **covariates: Tensor) -> None:
        lines: dict[str, Tensor] = {}
        shared = [place for place, site in enumerate(self.spec["sites"]) if not site["local"]]
        for place in shared:
            head = self.heads[place]
            constant = self.constant[:, : _constants(self.spec["sites"][place])]
            value = pyro.sample(self.order[place], Single(head(constant, self._parents(place, lines, 1))))
            lines[self.order[place]] = head.to_line(value[None])
        if len(shared) < len(self.order):
            given = {**observed, **covariates}
            features = self.encoder({name: given[name] for name in self.inputs})
            with pyro.plate(PLATE, size):
                self._sample_local(features, lines, size)

    def _sample_local(self, features: Tensor, lines: dict[str, Tensor], size: int) -> None:
        """The local latents, from features (of as many rows, or one a datum) and the lines of the shared ones."""
        if self.top_down is not None:
            features = features.repeat_interleave(size // len(features), 0)
        state = None if self.top_down is None else self.top_down.start(features, list(lines.values()))
        for place in range(len(lines), len(self.order)):
            seen = features if state is None else torch.cat([features, state], -1)
            value = pyro.sample(self.order[place], self.heads[place](seen, self._parents(place, lines, size), size))
            lines[self.order[place]] = line = self.heads[place].to_line(value)
            if state is not None and self.top_down is not None:
                state = self.top_down(state, place, line)

    def _parents(self, place: int, lines: Mapping[str, Tensor], size: int) -> Tensor | None:
        seen = [lines[name].expand(size, -1) for name in self.spec["sites"][place]["parents"]]
        return torch.cat(seen, -1) if seen else None


def _constants(site: Mapping[str, Any]) -> int:
    """Features of a shared latent's head; without parents a single one, since more only multiply Adam's step."""
    return _CONSTANTS if site["parents"] else 1


class TopDown(nn.Module):
    """The state that runs from latent to latent: it starts from the features, and each latent modulates it in turn.

    Args:
        features: number of the encoder's features.
        widths: entries on the line of each latent but the last, in the guide's order.
    """

    def __init__(self, features: int, widths: list[int]) -> None:
        super().__init__()
        self.first = nn.Sequential(nn.Linear(features, _STATE), nn.SiLU())
        self.steps = nn.ModuleList(Modulation(_STATE, width) for width in widths)

    def start(self, features: Tensor, lines: list[Tensor]) -> Tensor:
        """The state `(size, width)` that the first local latent meets, after the shared ones."""
        state = self.first(features)
        for place, line in enumerate(lines):
            state = self(state, place, line.expand(len(state), -1))
        return state

    def forward(self, state: Tensor, place: int, line: Tensor) -> Tensor:
        """The state after the latent at a place of the order."""
        return self.steps[place](state, line) if place < len(self.steps) else state


class Single(dist.TorchDistribution):
    """A distribution of batch shape (1,) as one of batch shape (): a head's, for a shared latent."""

    arg_constraints: dict[str, constraints.Constraint] = {}

    def __init__(self, base_dist: dist.TorchDistribution) -> None:
        self.base_dist, self.has_rsample = base_dist, base_dist.has_rsample
        super().__init__(torch.Size(), base_dist.event_shape, validate_args=False)

    @property
    def support(self) -> constraints.Constraint | None:
        return self.base_dist.support

    def rsample(self, sample_shape: Any = ()) -> Tensor:
        return self.base_dist.rsample(torch.Size(sample_shape)).squeeze(-1 - self.event_dim)

    def sample(self, sample_shape: Any = ()) -> Tensor:
        return self.base_dist.sample(torch.Size(sample_shape)).squeeze(-1 - self.event_dim)

    def log_prob(self, value: Tensor) -> Tensor:
        return self.base_dist.log_prob(value.unsqueeze(-1 - self.event_dim)).squeeze(-1)


@register_kl(Single, torch.distributions.Distribution)
def _kl_of_single(q: Single, p: dist.TorchDistribution) -> Tensor:
    """A shared latent in plates of its own is one event here."""
    return kl_divergence(q.base_dist, p.to_event(len(p.batch_shape)).expand((1,))).squeeze(0)


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
    encoder: str | Mapping[str, Any] | nn.Module | None = None,
    covariates: Mapping[str, Any] | None = None,
    seed: int = 0,
) -> Guide:
    """A guide for the latents of a program; all its parameters exist at once, near the prior.

    Args:
        model: the program.
        observed: the data, for shapes and input statistics (which the guide keeps).
        structure: which latents see which: "faithful" (a minimal structure that loses no dependency of the posterior:
            Webb et al. 2018, arXiv 1712.00287), "mean-field" (none), "program" (the program's own order and parents,
            beside a top-down state that all share), "full" (each sees all before it, through a linear regression),
            "collapsed" (the exact conditional of the latents that are jointly Gaussian given a scale, which alone is
            learned).
        family: "auto" (by support and prior; "dense" in a full structure, "flow" for the scale of a collapsed one), or
            a family by site, of `calibrant.guides.FAMILIES`.
        encoder: "mlp", "conv", "set", "sequence" or input → kind, as `guides.encoders.make_encoder` takes them; a
            module `dict of inputs → (size, features)` with an attribute `features`; or None for a choice by shape.
        covariates: keyword → tensor; the encoder sees them too.
        seed: of the first weights.

    Raises:
        ProgramError: for a shared discrete latent, a support without a family, an unknown option.
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
    spec = {
        "structure": structure,
        "encoder": _encoder_spec(encoder, rows, structure),
        "inputs": {name: list(value.shape[1:]) for values in rows for name, value in values.items()},
        "sites": [_site_spec(latent[name], parents, structure, family) for name, parents in learned.items()],
        **({"block": block} if block else {}),
    }
    with seeded(seed), defaults(program, rows[0]) as place:
        guide = from_spec(spec, encoder if isinstance(encoder, nn.Module) else None, program).to(*place)
        _set_statistics(guide, program, *(cast(part, *place) for part in rows))
        _narrow(guide, len(data))
    return guide


def _head_rows(data: Data) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    return data.batch(torch.arange(min(len(data), _STATISTICS_ROWS)))


def encoder_of(spec: Mapping[str, Any]) -> nn.Module:
    """A new encoder, as a guide's specification asks for it."""
    if spec["encoder"] is None:
        raise ProgramError("this guide was made with an encoder of yours: give it again, encoder=")
    return make_encoder(spec["encoder"], {name: tuple(shape) for name, shape in spec["inputs"].items()})


def _encoder_spec(
    encoder: str | Mapping[str, Any] | nn.Module | None,
    rows: tuple[dict[str, Tensor], dict[str, Tensor]],
    structure: str,
) -> str | dict[str, Any] | None:
    if isinstance(encoder, nn.Module):
        if not hasattr(encoder, "features"):
            raise ProgramError("an encoder tells the number of its outputs in its attribute `features`")
        return None
    shapes = {n: tuple(v.shape[1:]) for values in rows for n, v in values.items()}
    spec = encoder or default_encoder(shapes)
    if structure == "collapsed":
        [(name, shape)] = shapes.items()
        return encoder_of_a_scale(spec, name, shape)
    if isinstance(spec, Mapping):
        return {name: dict(kind) if isinstance(kind, Mapping) else kind for name, kind in spec.items()}
    return spec


def _site_spec(site: Site, parents: tuple[str, ...], structure: str, family: str | Mapping[str, str]) -> dict[str, Any]:
    if site.support.is_discrete and not site.local:
        raise ProgramError(
            f"latent {site.name!r} is discrete and shared: amortize enumerates discrete latents of single data alone; "
            "sum it out of the model"
        )
    asked = family.get(site.name, "auto") if isinstance(family, Mapping) else family
    chosen = choose_family(site.name, site.support, site.prior, asked)
    if asked == "auto" and structure in _RICHER:
        with suppress(ProgramError):  # classes and directions have no covariance on the line
            chosen = choose_family(site.name, site.support, site.prior, _RICHER[structure])
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
    """Some rows in a row, from the beginning again after the last."""
    return {
        n: value[torch.arange(first, first + count, device=value.device) % len(value)] for n, value in values.items()
    }


@torch.no_grad()
def _narrow(guide: Guide, total: int) -> None:
    """Start shared latents at 1/√N of a local one's scale, but no less than a sixteenth.

    All data speak of a shared latent. Adam comes down slowly from a scale that is far too wide, since it remembers the
    large gradients there; from one that is too narrow it rises quickly.
    """
    factor = max(total**-0.5, 1 / 16)
    shift = log(expm1(0.25 * factor)) - log(expm1(0.25))  # a head's scales are softplus of its numbers
    for site, head in zip(guide.spec["sites"], guide.heads, strict=True):
        if not site["local"]:
            count = head.family.locations
            head.out.bias[count : 2 * count] += shift  # the scales follow the locations

"""Amortized guides: an encoder, and a head for every latent."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from pyro.nn import PyroModule
from torch import Tensor, nn
from torch.distributions import constraints, kl_divergence, register_kl

from calibrant.guides.describing import facts_of_spec
from calibrant.guides.encoders.choosing import encoder_of
from calibrant.guides.families.heads import Head, Modulation
from calibrant.program.contract import PLATE
from calibrant.shown import Shown

_CONSTANTS = 32  # constant features in the head of a shared latent, which its parents modulate
_STATE = 128  # width of the top-down state


class AmortizedGuide(Shown, PyroModule):
    """q(latents | observations): an encoder, and a head for every latent site, in the order of a structure.

    The head of a local latent sees the features of the encoder and the earlier latents that the structure names
    (`guides/structure.py`). If the encoder has an attribute `for_scalars` above 0, its last features, so many, are for
    scalar latents, and the other latents see the rest. The distribution of a shared latent is learned: it is drawn
    once, outside the data plate, and its head sees the shared latents that the structure names, but no data, since
    these come in minibatches. With the structure "program", a top-down state is passed from latent to latent and
    updated by each, and local heads see it together with the features, as in hierarchical VAEs (Sønderby et al. 2016,
    arXiv 1602.02282).

    Args:
        spec: specification from which the guide can be rebuilt without data (JSON values); `amortize` creates it.
        encoder: a module `dict of inputs → (size, features)` with an attribute `features`, used instead of the encoder
            that the specification names.
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
            features = len(self._seen(site)) + _STATE * has_state if site["local"] else _constants(site)
            seen = sum(heads[parent].width_on_line for parent in site["parents"])
            heads[site["name"]] = Head(
                features,
                seen,
                torch.Size(site["event_shape"]),
                site["family"],
                regression=spec["structure"] == "full",
            )
        self.order, self.heads = list(heads), nn.ModuleList(heads.values())
        widths = [heads[name].width_on_line for name in self.order[:-1]]  # no latent sees the last one
        self.top_down = TopDown(self.encoder.features, widths) if has_state else None
        self.register_buffer("constant", torch.ones(1, _CONSTANTS), persistent=False)

    def facts(self) -> dict[str, str]:
        return facts_of_spec(self.spec, self)

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
        """Sample the local latents.

        Args:
            features: `(size, features)`, or one row per datum if a datum has several rows.
            lines: standardised values of the shared latents; those of the local latents are added.
            size: number of rows.
        """
        if self.top_down is not None:
            features = features.repeat_interleave(size // len(features), 0)
        state = None if self.top_down is None else self.top_down.start(features, list(lines.values()))
        for place in range(len(lines), len(self.order)):
            own = self._seen(self.spec["sites"][place])
            seen = features[:, own.start : own.stop]
            seen = seen if state is None else torch.cat([seen, state], -1)
            value = pyro.sample(self.order[place], self.heads[place](seen, self._parents(place, lines, size), size))
            lines[self.order[place]] = line = self.heads[place].to_line(value)
            if state is not None and self.top_down is not None:
                state = self.top_down(state, place, line)

    def _seen(self, site: Mapping[str, Any]) -> range:
        """Places of the features that the head of a local latent sees: all, unless scalars have some of their own."""
        own, end = getattr(self.encoder, "for_scalars", 0), self.encoder.features
        if not own:
            return range(end)
        return range(end - own, end) if not site["event_shape"] else range(end - own)

    def _parents(self, place: int, lines: Mapping[str, Tensor], size: int) -> Tensor | None:
        seen = [lines[name].expand(size, -1) for name in self.spec["sites"][place]["parents"]]
        return torch.cat(seen, -1) if seen else None


def _constants(site: Mapping[str, Any]) -> int:
    """Number of features in the head of a shared latent: 1 without parents, since more only multiply Adam's step."""
    return _CONSTANTS if site["parents"] else 1


class TopDown(nn.Module):
    """The state that is passed from latent to latent: computed from the features, then modulated by each latent.

    Args:
        features: number of features of the encoder.
        widths: number of unconstrained entries of each latent except the last, in the order of the guide.
    """

    def __init__(self, features: int, widths: list[int]) -> None:
        super().__init__()
        self.first = nn.Sequential(nn.Linear(features, _STATE), nn.SiLU())
        self.steps = nn.ModuleList(Modulation(_STATE, width) for width in widths)

    def start(self, features: Tensor, lines: list[Tensor]) -> Tensor:
        """The state `(size, width)` for the first local latent, after modulation by the shared latents."""
        state = self.first(features)
        for place, line in enumerate(lines):
            state = self(state, place, line.expand(len(state), -1))
        return state

    def forward(self, state: Tensor, place: int, line: Tensor) -> Tensor:
        """The state after the latent at position `place` of the order."""
        return self.steps[place](state, line) if place < len(self.steps) else state


class Single(dist.TorchDistribution):
    """A distribution of batch shape (1,), as heads return it, as one of batch shape (), for a shared latent."""

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
    """The KL divergence of a shared latent, whose own plates count as part of the event."""
    return kl_divergence(q.base_dist, p.to_event(len(p.batch_shape)).expand((1,))).squeeze(0)

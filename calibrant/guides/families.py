"""Families of variational distributions, and the head that computes one's parameters from features.

The head's outputs are relative to the prior's location and scale on the real line, so that a fresh guide lies within
the prior for every support: at its location, with a quarter of its scale. (With the whole scale, the decoder at first
sees mostly noise, learns to ignore the latents, and a learned noise scale grows until it explains the data alone.)
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pyro.distributions as dist
import torch
from torch import Tensor, nn
from torch.distributions import constraints
from torch.nn.functional import softplus

from calibrant.errors import ProgramError
from calibrant.program import unwrapped

_START = -1.26  # softplus(_START) = 0.25, see Head
_FARTHEST = 30.0  # prior scales from the prior's location: exp() of more would overflow while training is young


def _gamma(loc: Tensor, scale: Tensor) -> dist.TorchDistribution:
    """Mean exp(loc), coefficient of variation `scale`: the shape is learned."""
    shape = scale.pow(-2)
    return dist.Gamma(shape, shape * (-loc).exp())


@dataclass(frozen=True)
class Family:
    """`build(loc, scale)` on the real line, where `to_line` maps the support."""

    build: Callable[[Tensor, Tensor], dist.TorchDistribution]
    support: constraints.Constraint
    to_line: Callable[[Tensor], Tensor]


FAMILIES: dict[str, Family] = {
    "normal": Family(dist.Normal, constraints.real, lambda value: value),
    "laplace": Family(dist.Laplace, constraints.real, lambda value: value),
    "lognormal": Family(dist.LogNormal, constraints.positive, torch.log),
    "gamma": Family(_gamma, constraints.positive, torch.log),
}


def choose_family(name: str, support: constraints.Constraint, prior: Any, asked: str = "auto") -> str:
    """The family of a site: by support, and on positive numbers the prior's own where it is one of ours.

    On the real line a Normal, under a Laplace prior too: what data say of a latent is nearly Normal, and the gradient
    of a Laplace guide keeps its noise at the optimum (on natural patches its ELBO ended 5 to 9 nats lower).

    Raises:
        ProgramError: for an unknown family, one whose support is another, or a support that no family has.
    """
    if isinstance(unwrapped(prior), dist.VonMises | dist.SineBivariateVonMises):
        raise ProgramError(
            f"site {name!r} is an angle, which no family covers yet: write the guide by hand, or sample two Normals in "
            "the program and take their atan2"
        )
    support, own = _base(support), type(_base(prior)).__name__.lower()
    if asked != "auto":
        if asked not in FAMILIES:
            raise ProgramError(f"site {name!r}: unknown family {asked!r}; known: {sorted(FAMILIES)}")
        if not _same(FAMILIES[asked].support, support):
            raise ProgramError(
                f"site {name!r} has support {support}, the family {asked!r} has {FAMILIES[asked].support}"
            )
        return asked
    if own in FAMILIES and own != "laplace" and _same(FAMILIES[own].support, support):
        return own
    for family in ("normal", "lognormal"):
        if _same(FAMILIES[family].support, support):
            return family
    raise ProgramError(
        f"site {name!r} has support {support}, which no family covers yet ({sorted(FAMILIES)}): rewrite it with a real "
        "or positive latent, or write the guide by hand (a PyroModule called as guide(observed, size, **covariates))"
    )


def _base(wrapped: Any) -> Any:
    kinds = (constraints.independent, dist.Independent, dist.ExpandedDistribution, dist.MaskedDistribution)
    while isinstance(wrapped, kinds) or type(wrapped).__name__ == "Independent":
        wrapped = getattr(wrapped, "base_constraint", None) or wrapped.base_dist
    return wrapped


def _same(family: constraints.Constraint, support: Any) -> bool:
    if family is constraints.positive:
        return (
            isinstance(support, (type(constraints.positive), type(constraints.nonnegative)))
            and float(support.lower_bound) == 0.0
        )
    return support is constraints.real or isinstance(support, type(constraints.real))


class Modulation(nn.Module):
    """Gain and offset of the features, from earlier latents and a short summary of the features themselves."""

    def __init__(self, features: int, parents: int, hidden: int = 64, summary: int = 16) -> None:
        super().__init__()
        self.summary = nn.Linear(features, summary)
        self.network = nn.Sequential(nn.Linear(parents + summary, hidden), nn.SiLU(), nn.Linear(hidden, 2 * features))
        self.damp = hidden**-0.5  # a step of Adam moves all gains at once: keep their sum from running away

    def forward(self, features: Tensor, parents: Tensor) -> Tensor:
        context = torch.cat([parents, self.summary(features).tanh()], -1)
        gain, offset = (self.damp * self.network(context)).chunk(2, -1)
        return features * (1 + gain) + offset


class Head(nn.Module):
    """Features and earlier latents → the distribution of one site.

    The earlier latents modulate the features (gain and offset), which contains the exact posterior mean and sd of a
    linear decoder under a given scale: products of functions of the scale with linear functions of the image.

    Args:
        features: number of features.
        parents: total number of entries of the earlier latents; 0 for none.
        event_shape: of the site.
        family: a name of `FAMILIES`.
    """

    center: Tensor
    width: Tensor

    def __init__(self, features: int, parents: int, event_shape: tuple[int, ...], family: str) -> None:
        super().__init__()
        self.event_shape, self.family = torch.Size(event_shape), FAMILIES[family]
        entries = self.event_shape.numel()
        self.out = nn.Linear(features, 2 * entries)
        nn.init.normal_(self.out.weight, std=0.1)
        nn.init.zeros_(self.out.bias)
        self.modulation = Modulation(features, parents) if parents else None
        self.register_buffer("center", torch.zeros(self.event_shape))
        self.register_buffer("width", torch.ones(self.event_shape))

    @torch.no_grad()
    def set_prior(self, draws: Tensor) -> None:
        """Take the prior's location and scale from its draws `(n, *event_shape)`."""
        low, middle, high = self.family.to_line(draws).quantile(torch.tensor([0.16, 0.5, 0.84]).to(draws), dim=0)
        self.center.copy_(middle)
        self.width.copy_((high - low) / 2)

    def to_line(self, value: Tensor) -> Tensor:
        """A value of this site, standardised by its prior, `(size, entries)`: what later heads see."""
        return ((self.family.to_line(value) - self.center) / self.width).reshape(len(value), -1)

    def forward(self, features: Tensor, parents: Tensor | None) -> dist.TorchDistribution:
        if self.modulation is not None and parents is not None:
            features = self.modulation(features, parents)
        # Divided by √features, so that a step of Adam moves the outputs equally whatever the width of the encoder.
        loc, raw = self.out(features / features.shape[1] ** 0.5).reshape(len(features), 2, *self.event_shape).unbind(1)
        if self.family.support is constraints.positive:
            loc = _FARTHEST * torch.tanh(loc / _FARTHEST)
        scale = self.width * (softplus(raw + _START) + 1e-6)
        return self.family.build(self.center + self.width * loc, scale).to_event(len(self.event_shape))

"""The family of a site, and the head that computes its distribution from features."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pyro.distributions as dist
import torch
from torch import Tensor, nn
from torch.distributions import constraints

from calibrant.errors import ProgramError
from calibrant.guides import densities
from calibrant.guides.densities import ENTRIES, Family
from calibrant.guides.supports import describe


def _flow(event_shape: tuple[int, ...], support: str) -> Family:
    from calibrant.guides.flows import Flow

    return Flow(event_shape, support)


_THROUGH_THE_LINE: dict[str, Callable[[tuple[int, ...], str], Family]] = {
    "transformed": densities.Transformed,
    "dense": densities.Dense,
    "low-rank": densities.LowRank,
    "flow": _flow,
}
_OF_SHAPE: dict[str, Callable[[tuple[int, ...]], Family]] = {
    "dirichlet": densities.Dirichlet,
    "vonmises": densities.Circle,
    "vmf": densities.Sphere,
    "bernoulli": densities.Binary,
    "onehot": densities.OneHot,
}
FAMILIES = (*ENTRIES, *_THROUGH_THE_LINE, *_OF_SHAPE, "categorical")
_ANGLES = (dist.VonMises, dist.SineBivariateVonMises)
_OWN = {  # family of the posterior by type of the prior
    "StudentT": "studentt",
    "Cauchy": "studentt",
    "Gamma": "gamma",
    "Exponential": "gamma",
    "Chi2": "gamma",
    "Beta": "beta",
    "Uniform": "beta",
    "Dirichlet": "dirichlet",
}
_USUAL = {"real": "normal", "positive": "lognormal"}


def make_family(text: str, event_shape: tuple[int, ...]) -> Family:
    """The family that `choose_family` has named, for a site of an event shape.

    Raises:
        ProgramError: for an unknown name.
    """
    name, _, support = text.partition("@")
    if name in ENTRIES:
        return densities.Entrywise(event_shape, ENTRIES[name])
    if name in _THROUGH_THE_LINE:
        return _THROUGH_THE_LINE[name](event_shape, support or "real")
    if name in _OF_SHAPE:
        return _OF_SHAPE[name](event_shape)
    if name.startswith("categorical["):
        return densities.Classes(event_shape, int(name[12:-1]))
    raise ProgramError(f"unknown family {text!r}; known: {FAMILIES}")


def choose_family(name: str, support: constraints.Constraint, prior: Any, asked: str = "auto") -> str:
    """The family of a site, in words that rebuild it: `normal`, `transformed@interval[0.0, 5.0]`, `categorical[3]`.

    By support, and the prior's own where it is one of ours. On the real line a Normal, under a Laplace prior too: what
    data say of a latent is nearly Normal, and the gradient of a Laplace guide keeps its noise at the optimum (on
    natural patches its ELBO ended 5 to 9 nats lower). An angle is told by its prior, von Mises, whose support is the
    real line in torch.

    Args:
        name: of the site.
        support: of the site.
        prior: its distribution in one run of the program.
        asked: a name of `FAMILIES`, or "auto".

    Raises:
        ProgramError: for an unknown family, one whose support is another, or a support that no family has.
    """
    if asked not in ("auto", *FAMILIES):
        raise ProgramError(f"site {name!r}: unknown family {asked!r}; known: {('auto', *FAMILIES)}")
    first, *others = _candidates(name, support, prior)
    candidates = {text.partition("@")[0].partition("[")[0]: text for text in (first, *others)}
    if asked != "auto" and asked not in candidates:
        raise ProgramError(
            f"site {name!r} has support {support} and the prior {type(_base(prior)).__name__}, which the family "
            f"{asked!r} does not cover; those that do: {sorted(candidates)}"
        )
    return first if asked == "auto" else candidates[asked]


def _candidates(name: str, support: Any, prior: Any) -> list[str]:
    """The families that cover a site, the best first."""
    support, own = _base(support), _base(prior)
    if isinstance(own, _ANGLES):
        return ["vonmises"]
    if type(support) is type(dist.constraints.sphere):
        return ["vmf"]
    if support.is_discrete:
        return [_finite(name, own)]
    words = describe(name, support, len(prior.event_shape))
    suffix = "" if words == "real" else f"@{words}"
    entrywise = [family for family, entry in ENTRIES.items() if entry.support == words]
    mapped = [family + suffix for family in _THROUGH_THE_LINE]
    covering = [*entrywise, *(["dirichlet"] if words == "simplex" else []), *mapped]
    best = _OWN.get(type(own).__name__, _USUAL.get(words))
    return sorted(covering, key=lambda family: (family != best, family != f"transformed{suffix}"))


def _finite(name: str, prior: Any) -> str:
    if isinstance(prior, dist.Bernoulli):
        return "bernoulli"
    if isinstance(prior, dist.Categorical):
        return f"categorical[{prior.logits.shape[-1]}]"
    if isinstance(prior, dist.OneHotCategorical):
        return "onehot"
    raise ProgramError(
        f"latent {name!r} is discrete with the prior {type(prior).__name__}: families cover Bernoulli, Categorical and "
        "OneHotCategorical; sum it out in the program, or write the guide by hand"
    )


def _base(wrapped: Any) -> Any:
    kinds = (constraints.independent, dist.Independent, dist.ExpandedDistribution, dist.MaskedDistribution)
    while isinstance(wrapped, kinds) or type(wrapped).__name__ == "Independent":
        wrapped = getattr(wrapped, "base_constraint", None) or wrapped.base_dist
    return wrapped


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

    def through(self, out: nn.Linear, features: Tensor, parents: Tensor) -> Tensor:
        """`out` of the modulated features, divided by their root number, for many parents of each datum.

        It is linear in the hidden layer, by a matrix that the features of the datum alone make: a draw then costs as
        much as that layer has units, not as there are features.

        Args:
            out: a linear map of features.
            features: `(size, features)`.
            parents: `(size · draws, parents)`, those of a datum in a row.
        """
        size, draws = len(features), len(parents) // len(features)
        summary = self.summary(features).tanh().repeat_interleave(draws, 0)
        first, activation, last = self.network.children()
        hidden = activation(first(torch.cat([parents, summary], -1))).reshape(size, draws, -1)
        weight = out.weight / features.shape[1] ** 0.5
        last_weight, last_bias = last.parameters()
        (gain, offset), (gain_bias, offset_bias) = last_weight.chunk(2), last_bias.chunk(2)
        slope = self.damp * ((weight * features[:, None]) @ gain + weight @ offset)
        start = features * (1 + self.damp * gain_bias) + self.damp * offset_bias
        raw = hidden @ slope.mT + (start @ weight.T + out.bias)[:, None]
        return raw.reshape(len(parents), -1)


class Regression(nn.Module):
    """Locations that are linear in earlier latents, by coefficients that the features change.

    B = diag(1 + a) W diag(1 + c) with a and c linear in the features; W is zero at the start.
    """

    def __init__(self, features: int, parents: int, locations: int) -> None:
        super().__init__()
        self.slopes = nn.Linear(parents, locations, bias=False)
        self.gains = nn.Linear(features, parents + locations)
        self.sizes, self.damp = (parents, locations), parents**-0.5
        for weight in (self.slopes.weight, self.gains.weight, self.gains.bias):
            nn.init.zeros_(weight)

    def forward(self, features: Tensor, parents: Tensor) -> Tensor:
        gains = self.gains(features / features.shape[1] ** 0.5).repeat_interleave(len(parents) // len(features), 0)
        before, after = gains.split(self.sizes, -1)
        return (1 + after) * self.slopes(self.damp * (1 + before) * parents)


class Head(nn.Module):
    """Features and earlier latents → the distribution of one site.

    The earlier latents modulate the features (gain and offset), which contains the exact posterior mean and sd of a
    linear decoder under a given scale: products of functions of the scale with linear functions of the image.

    Args:
        features: number of features.
        parents: total number of entries of the earlier latents; 0 for none.
        event_shape: of the site.
        family: as `choose_family` names it.
        regression: locations are also linear in the earlier latents, so that heads one after the other make any joint
            Normal on the line.

    Attributes:
        width_on_line: number of entries that `to_line` gives.
    """

    center: Tensor
    width: Tensor

    def __init__(
        self, features: int, parents: int, event_shape: tuple[int, ...], family: str, regression: bool = False
    ) -> None:
        super().__init__()
        self.family = make_family(family, torch.Size(event_shape))
        self.width_on_line = self.family.width_on_line
        self.out = nn.Linear(features, self.family.raw)
        nn.init.normal_(self.out.weight, std=0.1)
        nn.init.zeros_(self.out.bias)
        self.modulation = Modulation(features, parents) if parents else None
        self.regression = Regression(features, parents, self.family.locations) if parents and regression else None
        center, width = self.family.start()
        self.register_buffer("center", center)
        self.register_buffer("width", width)

    @torch.no_grad()
    def set_prior(self, draws: Tensor) -> None:
        """Take the prior's location and scale from its draws `(n, *event_shape)`."""
        center, width = self.family.statistics(draws)
        self.center.copy_(center)
        self.width.copy_(width)

    def to_line(self, value: Tensor) -> Tensor:
        """A value of this site, standardised by its prior, `(size, width_on_line)`: what later heads see.

        Directions are unit vectors there, classes indicators of ±1.
        """
        return self.family.standardize(value, self.center, self.width)

    def forward(self, features: Tensor, parents: Tensor | None, size: int | None = None) -> dist.TorchDistribution:
        """The distribution of `size` rows; where there are fewer features, each datum's rows come one after another."""
        raw = self._raw(features, parents)
        if size is not None and len(raw) < size:
            raw = raw.repeat_interleave(size // len(raw), 0)
        if self.regression is not None and parents is not None:
            loc, others = raw[:, : self.family.locations], raw[:, self.family.locations :]
            raw = torch.cat([loc + self.regression(features, parents), others], -1)
        return self.family.build(raw, self.center, self.width)

    def _raw(self, features: Tensor, parents: Tensor | None) -> Tensor:
        if self.modulation is not None and parents is not None:
            if len(parents) > len(features):
                return self.modulation.through(self.out, features, parents)
            features = self.modulation(features, parents)
        # Divided by √features, so that a step of Adam moves the outputs equally whatever the width of the encoder.
        return self.out(features / features.shape[1] ** 0.5)

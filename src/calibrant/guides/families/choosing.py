"""The choice of a family for a site, by support and prior or by name."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pyro.distributions as dist
import torch
from torch.distributions import OneHotCategorical, constraints

from calibrant.errors import ProgramError
from calibrant.guides.families import densities, finite, on_spheres, plain
from calibrant.guides.families.densities import ENTRIES, Family
from calibrant.guides.families.support_text import describe
from calibrant.program.supports import (
    base_support,
    bounds,
    is_circular,
    is_sphere,
    single_entry,
    undressed,
    usual_support,
)


def _flow(event_shape: tuple[int, ...], support: str) -> Family:
    from calibrant.guides.families.flows import Flow

    return Flow(event_shape, support)


_THROUGH_THE_LINE: dict[str, Callable[[tuple[int, ...], str], Family]] = {
    "transformed": densities.Transformed,
    "dense": densities.Dense,
    "low-rank": densities.LowRank,
    "flow": _flow,
}
_OF_SHAPE: dict[str, Callable[[tuple[int, ...]], Family]] = {
    "log-variance": plain.LogVariance,
    "laplace-log-variance": partial(plain.LogVariance, build=plain.laplace_of_sd),
    "lognormal-log-variance": partial(plain.LogVariance, build=dist.LogNormal, support="positive"),
    "gamma-truncated": plain.GammaTruncated,
    "dirichlet": densities.Dirichlet,
    "vonmises": on_spheres.Circle,
    "vmf": on_spheres.Sphere,
    "bernoulli": finite.Binary,
    "onehot": finite.OneHot,
}
_OF_WORDS = {  # support → families of `_OF_SHAPE`
    "real": ["log-variance", "laplace-log-variance"],
    "positive": ["lognormal-log-variance", "gamma-truncated"],
    "simplex": ["dirichlet"],
}
FAMILIES = (*ENTRIES, *_THROUGH_THE_LINE, *_OF_SHAPE, "categorical")
_OWN = {  # type of the prior → family of the posterior
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
    """Build the family with a name that `choose_family` has returned, for a site of the given event shape.

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
        return finite.Classes(event_shape, int(name[12:-1]))
    raise ProgramError(f"unknown family {text!r}; known: {FAMILIES}")


def choose_family(name: str, support: constraints.Constraint, prior: Any, asked: str = "auto") -> str:
    """Choose the family of a site, such as `normal`, `transformed@interval[0.0, 5.0]` or `categorical[3]`.

    The choice is by support, and by the type of the prior where there is a family of that type. On the real line, it is
    a Normal, even under a Laplace prior: likelihoods are nearly Normal in a latent, and the gradient of a Laplace guide
    stays noisy at the optimum (on natural patches, its ELBO ended 5 to 9 nats lower). Angles are recognised by their
    von Mises prior, since their support in torch is the real line.

    Args:
        name: name of the site.
        support: support of the site.
        prior: distribution of the site in one run of the program.
        asked: a name in `FAMILIES`, or "auto".

    Returns:
        A text from which `make_family` builds the family.

    Raises:
        ProgramError: for an unknown family, a family with another support, or a support that no family covers.
    """
    if asked not in ("auto", *FAMILIES):
        raise ProgramError(f"site {name!r}: unknown family {asked!r}; known: {('auto', *FAMILIES)}")
    first, *others = _candidates(name, support, prior)
    candidates = {text.partition("@")[0].partition("[")[0]: text for text in (first, *others)}
    if asked != "auto" and asked not in candidates:
        raise ProgramError(
            f"site {name!r} has support {support} and the prior {type(undressed(prior)).__name__}, which the family "
            f"{asked!r} does not cover; those that do: {sorted(candidates)}"
        )
    return first if asked == "auto" else candidates[asked]


def _candidates(name: str, support: Any, prior: Any) -> list[str]:
    """The families that cover a site, the default one first."""
    support, own = base_support(usual_support(support)), undressed(prior)
    if is_circular(prior):
        return ["vonmises"]
    if is_sphere(support):
        return ["vmf"]
    if support.is_discrete:
        return [_finite(name, support, single_entry(prior))]
    words = describe(name, support, len(prior.event_shape))
    suffix = "" if words == "real" else f"@{words}"
    entrywise = [family for family, entry in ENTRIES.items() if entry.support == words]
    mapped = [family + suffix for family in _THROUGH_THE_LINE]
    of_shape = _OF_WORDS.get(words, [])
    covering = [*entrywise, *of_shape, *mapped]
    best = _OWN.get(type(own).__name__, _USUAL.get(words))
    return sorted(covering, key=lambda family: (family != best, family != f"transformed{suffix}"))


def _finite(name: str, support: Any, prior: Any) -> str:
    """The family of a discrete site, from the support and the prior of single entries."""
    if isinstance(prior, dist.Bernoulli):
        return "bernoulli"
    if isinstance(prior, dist.Categorical):
        return f"categorical[{prior.logits.shape[-1]}]"
    if isinstance(prior, OneHotCategorical):  # that of torch, from which the straight-through one is made, too
        return "onehot"
    if isinstance(support, constraints.integer_interval):
        lowest, highest = (torch.as_tensor(bound).unique().tolist() for bound in bounds(support))
        if lowest == [0] and len(highest) == 1:
            return f"categorical[{int(highest[0]) + 1}]"
    raise ProgramError(
        f"latent {name!r} is discrete with the prior {type(prior).__name__}: families cover finitely many values "
        "(Bernoulli, Categorical, OneHotCategorical, and a Binomial with one total count); sample it from a "
        "Categorical over the values that matter, or sum it out in the observed site"
    )

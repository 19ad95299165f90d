"""The structure of a guide: the order in which it samples a program's latents, and the latents that each one sees.

Every local latent sees the observations, through the features of the encoder; the distribution of a shared latent is
learned from all data. Shared latents come first, since a site outside the data plate cannot depend on one inside.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from itertools import combinations

from calibrant.errors import ProgramError
from calibrant.program.latents import Site

Structure = dict[str, tuple[str, ...]]
"""Maps each latent, in the order in which the guide samples them, to the earlier latents that it sees."""


def structure_of(structure: str, sites: Mapping[str, Site]) -> Structure:
    """The order and the parents of the latents in a guide.

    Args:
        structure: a name of `STRUCTURES`.
        sites: the latents of a program, from `calibrant.program.sites`.

    Raises:
        ProgramError: for an unknown structure.
    """
    if structure not in STRUCTURES:
        raise ProgramError(f"unknown structure {structure!r}; known: {tuple(STRUCTURES)}")
    return STRUCTURES[structure](sites)


def mean_field(sites: Mapping[str, Site]) -> Structure:
    """No latent sees another latent."""
    return dict.fromkeys(_order(sites), ())


def program(sites: Mapping[str, Site]) -> Structure:
    """The order of the program; a latent sees the latents on which its prior depends."""
    order = _order(sites)
    return {name: tuple(parent for parent in order if parent in sites[name].parents) for name in order}


def full(sites: Mapping[str, Site]) -> Structure:
    """The order of the program; a latent sees all earlier latents."""
    order = _order(sites)
    return {name: tuple(order[:i]) for i, name in enumerate(order)}


def faithful(sites: Mapping[str, Site]) -> Structure:
    """A minimal faithful inverse: no dependency of the posterior is lost, and no edge can be removed.

    Latents are eliminated one at a time from the undirected graph of the posterior, and sampled in the reverse order.
    The neighbours of a latent when it is eliminated become its parents, and are connected with one another. Among the
    latents whose descendants have all been eliminated, the next is the one that connects the fewest new pairs
    (min-fill); ties are broken in favour of the latent that comes later in the program.

    This is the "reverse topological" NaMI algorithm of Webb et al. 2018 ("Faithful inversion of generative models for
    effective amortized inference", arXiv 1712.00287, algorithm 1), with three differences. Observations do not count as
    vertices, since every head sees all of them. Local latents are eliminated before shared ones. And a latent without
    observed descendants connects no pairs, since its conditional integrates to one (the paper's graph marries its
    parents). Eliminating from the leaves keeps q(z | scale, x) in the order in which such conditionals are simple, and
    lets shared latents come first.
    """
    scopes, left, seen = _scopes(sites), list(sites), dict[str, frozenset[str]]()
    while left:
        name = min(reversed(_frontier(sites, left)), key=lambda candidate: len(_fill(candidate, scopes)))
        touched = [scope for scope in scopes if name in scope]
        seen[name] = frozenset[str]().union(*touched) - {name}
        scopes = [scope for scope in scopes if name not in scope]
        if len(touched) > 1:  # otherwise only its own conditional is left, which integrates to one
            scopes.append(seen[name])
        left.remove(name)
    return _in_order(sites, seen)


STRUCTURES: dict[str, Callable[[Mapping[str, Site]], Structure]] = {
    "faithful": faithful,
    "mean-field": mean_field,
    "program": program,
    "full": full,
    "collapsed": mean_field,  # of the latents outside the Gaussian block, which are one scale at most
}


def _order(sites: Mapping[str, Site]) -> list[str]:
    """Shared latents, then local ones, each in the program's order."""
    return sorted(sites, key=lambda name: sites[name].local)


def _scopes(sites: Mapping[str, Site]) -> list[frozenset[str]]:
    """The latents in each factor of the joint density: the priors, the likelihoods and each `pyro.factor`."""
    given = dict.fromkeys(child for site in sites.values() for child in site.children if child not in sites)
    priors = [frozenset({name, *site.parents}) for name, site in sites.items()]
    return priors + [frozenset(name for name, site in sites.items() if child in site.children) for child in given]


def _frontier(sites: Mapping[str, Site], left: Collection[str]) -> list[str]:
    """The latents that may be eliminated next: local ones before shared ones, and children before parents."""
    local = [name for name in left if sites[name].local] or list(left)
    return [name for name in local if not set(sites[name].children) & set(left)]


def _fill(name: str, scopes: list[frozenset[str]]) -> list[tuple[str, str]]:
    """The pairs of latents that eliminating `name` would connect."""
    touched = [scope for scope in scopes if name in scope]
    if len(touched) == 1:
        return []
    pairs = combinations(sorted(frozenset[str]().union(*touched) - {name}), 2)
    return [pair for pair in pairs if not any(scope.issuperset(pair) for scope in scopes)]


def _in_order(sites: Mapping[str, Site], seen: Mapping[str, Collection[str]]) -> Structure:
    """The structure with parents before children, otherwise as close as possible to the order of the program."""
    order, result = _order(sites), Structure()
    while len(result) < len(order):
        name = next(name for name in order if name not in result and set(seen[name]) <= result.keys())
        result[name] = tuple(parent for parent in result if parent in seen[name])
    return result
